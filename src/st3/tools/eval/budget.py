"""Bring policies to the same mean visual share, and set random choice beside each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import st3
from st3.methods.policies import NoTrim, Policy, Random


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        budget: the mean share it was set to; None: it is measured as it was given.
        beside: the label of the policy whose counts a random choice has; None for a method.
        source: the policy as it was given, the same at every budget.
    """

    policy: Policy
    budget: float | None = None
    beside: str | None = None
    source: str = ""

    @property
    def label(self) -> str:
        """The policy as :func:`st3.methods.policies.parse` reads it."""
        return str(self.policy)

    @property
    def title(self) -> str:
        """The row's name in tables; a random choice stands below the policy it is like."""
        if self.beside is not None:
            return "- random"
        return self.source + ("" if self.budget is None else f" at {100 * self.budget:g}%")


def usable(model: Any, policies: Sequence[Policy]) -> tuple[list[Policy], list[str]]:
    """The policies that can be attached to this model, and a note on each that cannot: some need
    what not every model has, such as a class token in the vision tower.

    Raises:
        ValueError: none of them can.
    """
    able: list[Policy] = []
    notes: list[str] = []
    for policy in policies:
        try:
            with st3.trim(model, policy):
                able.append(policy)
        except ValueError as error:
            notes.append(f"{policy} is left out: {error}")
    if not able:
        raise ValueError(notes[0])
    return able, notes


def entries(
    policies: Sequence[Policy], budgets: Sequence[float] | None, num_layers: int
) -> tuple[list[Entry], list[str]]:
    """The rows: the untrimmed model, each policy at each budget, and random choice at its counts
    (once for policies of the same counts; not where layers keep all or nothing). And a note on
    each that cannot be set to a budget.

    Raises:
        ValueError: a policy that does not fit the model's layers, or nothing is left to measure.
    """
    methods: list[Entry] = []
    notes: list[str] = []
    for policy in policies:
        if isinstance(policy, NoTrim):
            continue
        if budgets is None:
            policy.schedule(num_layers)
            methods.append(Entry(policy, source=str(policy)))
            continue
        for share in budgets:
            try:
                made = policy.at_budget(num_layers, share)
                methods.append(Entry(made, share, source=str(policy)))
            except ValueError as error:
                notes.append(f"{policy} at {share:.0%} is left out: {error}")
    if notes and not methods:
        raise ValueError(notes[0])
    rows = [Entry(NoTrim(), source="none")]
    seen = {rows[0].label}
    counts = set()
    for entry in methods:
        pair = [entry]
        schedule = entry.policy.schedule(num_layers)
        chooses = schedule.anneals or any(0 < share < 1 for share in schedule.shares)
        if chooses and not isinstance(entry.policy, Random) and schedule not in counts:
            beside = Random(like=entry.policy)
            pair.append(Entry(beside, entry.budget, entry.label, f"random like {entry.source}"))
        counts.add(schedule)
        rows += [row for row in pair if row.label not in seen]
        seen |= {row.label for row in pair}
    return rows, notes
