"""Bring policies to the same mean visual share, and set beside them what every method must beat:
random choice at its counts, an even grid, and the image made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import st3
from st3.methods.policies import NoTrim, Policy, Random, UniformGrid, plain


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        budget: the mean share it was set to; None: it is measured as it was given.
        beside: the label of the policy whose counts a random choice has; None for a method.
        source: the policy as it was given, the same at every budget.
        shrink: share of its pixels that the image is made smaller to, before the untrimmed model
            sees it; None for trimming. See :mod:`st3.tools.eval.shrink`.
    """

    policy: Policy
    budget: float | None = None
    beside: str | None = None
    source: str = ""
    shrink: float | None = None

    @property
    def label(self) -> str:
        """The policy as :func:`st3.methods.policies.parse` reads it; "downsample:keep=0.35" where
        the image is made smaller."""
        return str(self.policy) if self.shrink is None else f"downsample:keep={self.shrink:g}"

    @property
    def identity(self) -> str:
        """All that the row's answers depend on, defaults included."""
        return repr(self.policy) if self.shrink is None else self.label

    @property
    def title(self) -> str:
        """The row's name in tables; a random choice stands below the policy it is like."""
        if self.beside is not None:
            return "- random"
        return self.source + ("" if self.budget is None else f" at {100 * self.budget:g}%")


def usable(model: Any, policies: Sequence[Policy]) -> tuple[list[Policy], list[str]]:
    """The policies that can be attached to this model, and a note on each that cannot: some need
    what not every model has, such as a known way from the vision tower to the tokens.

    Raises:
        ValueError: none of them can.
    """
    able: list[Policy] = []
    notes: list[str] = []
    for policy in policies:
        try:
            with st3.trim(model, policy):
                able.append(plain(policy))
        except ValueError as error:
            notes.append(f"{policy} is left out: {error}")
    if not able:
        raise ValueError(notes[0])
    return able, notes


def entries(
    policies: Sequence[Policy],
    budgets: Sequence[float] | None,
    num_layers: int,
    baselines: bool = True,
) -> tuple[list[Entry], list[str]]:
    """The rows: the untrimmed model, each policy at each budget, and random choice at its counts
    (once for policies of the same counts; not where layers keep all or nothing). And a note on
    each that cannot be set to a budget.

    Args:
        baselines: with an even grid and the image made smaller at each budget, or else at each mean
            share of the policies.

    Raises:
        ValueError: a policy that does not fit the model's layers, or nothing is left to measure.
    """
    methods, notes = _at_budgets(policies, budgets, num_layers)
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
    if baselines and methods:
        given = budgets or _shares(methods, num_layers)
        rows += [row for row in _baselines(given, budgets is not None) if row.label not in seen]
    return rows, notes


def _at_budgets(
    policies: Sequence[Policy], budgets: Sequence[float] | None, num_layers: int
) -> tuple[list[Entry], list[str]]:
    """The policies at the budgets, and a note on each that cannot have one."""
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
    return methods, notes


def _shares(methods: Sequence[Entry], num_layers: int) -> list[float]:
    """The mean shares of policies that drop something, to a hundredth."""
    shares = [round(entry.policy.schedule(num_layers).mean_share, 2) for entry in methods]
    return sorted({share for share in shares if 0 < share < 1})


def _baselines(shares: Sequence[float], budgeted: bool) -> list[Entry]:
    rows = []
    for share in shares:
        budget = share if budgeted else None
        name = "grid" if budgeted else f"grid:keep={share:g}"
        rows.append(Entry(UniformGrid(keep=share), budget, source=name))
        name = "downsample" if budgeted else f"downsample:keep={share:g}"
        rows.append(Entry(NoTrim(), budget, source=name, shrink=share))
    return rows
