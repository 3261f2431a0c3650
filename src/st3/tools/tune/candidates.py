"""What is tried: every method of st3 with its defaults, some other settings, random choice and the
even grid among them, each at several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from st3.methods import DEFAULT_POLICY
from st3.methods.policies import NoTrim, Policy, available, parse, plain, with_budget
from st3.tools.eval.budget import Entry, usable

BUDGETS = (0.7, 0.5, 0.35, 0.25, 0.15)
BASELINES = ("random", "grid")
OF_VIDEOS = ("evs", "vidcom2")

#: Settings beside the defaults: the score, where drops begin and end, annealing.
SETTINGS = (
    "thirds:later=1", "thirds:later=0.8", "thirds:every=2", "thirds:salient=0.5",
    "thirds:salient=0.8", "thirds:window=6",
    "balanced:score=mixed2", "balanced:score=mixed3", "balanced:score=mixed12",
    "balanced:first_layer=2", "balanced:first_layer=3", "balanced:stride=2",
    "balanced:final_keep=0.4", "balanced:final_keep=0.1",
    "balanced:curve=none", "balanced:tau=128,floor=0.2",
    "st3:score=mixed", "st3:first_layer=1", "st3:curve=none",
    "fastv:layer=1,score=mixed", "fastv:layer=3", "pyramiddrop:score=mixed",
)  # fmt: skip


def sources(names: Sequence[str] = ("all",)) -> list[Policy]:
    """Policies from strings, each once; "all" stands for every method that this st3 has and for
    :data:`SETTINGS`. The default, random choice and the grid are always among them.

    Raises:
        ValueError: one that cannot be read.
    """
    found = [parse(name) for name in (DEFAULT_POLICY, *BASELINES)]
    for name in names:
        if name == "all":
            methods = [one for one in available() if one not in ("none", *OF_VIDEOS)]
            found += [parse(one) for one in (*methods, *SETTINGS)]
        else:
            found.append(plain(parse(name)))
    return list(dict.fromkeys(policy for policy in found if not isinstance(policy, NoTrim)))


class Candidates:
    """Policies that a model can have, at budgets.

    Attributes:
        default: the policy that is used where none is named, as it is.
        untrimmed: the row that all are held against.
        refused: policy and reason, of those that the model cannot have.
    """

    def __init__(self, model: Any, num_layers: int, policies: Sequence[Policy]) -> None:
        able, notes = usable(model, policies)
        self.layers, self.policies = num_layers, able
        self.refused: list[tuple[str, str]] = []
        for note in notes:
            name, _, why = note.partition(" is left out: ")
            self.refused.append((name, why))
        self.untrimmed = Entry(NoTrim(), source="none")
        default = with_budget(parse(DEFAULT_POLICY), num_layers)
        self.default = Entry(default, None, source=DEFAULT_POLICY)

    def at(self, budget: float, names: Sequence[str]) -> list[Entry]:
        """Those of these names that can have a budget, each count once."""
        found: dict[str, Entry] = {}
        for policy in self.policies:
            if str(policy) not in names:
                continue
            try:
                made = policy.at_budget(self.layers, budget)
                made.schedule(self.layers)
            except ValueError:
                continue
            found.setdefault(str(made), Entry(made, budget, source=str(policy)))
        return list(found.values())
