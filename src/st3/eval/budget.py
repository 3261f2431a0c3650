"""Bring policies to the same mean visual share, and set random choice beside each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from st3.policies import ST3, NoTrim, Policy, Random
from st3.schedule import check_share

# The argument that says how much a policy drops, in the order in which they are looked for. All of
# them are shares, along which the mean share rises or falls throughout.
_SHARES = ("drop", "keep", "mean_keep", "retain", "ratio", "final_keep")
_LAYER = "layer"  # for those that drop everything from a layer on
_STEPS = 50  # of bisection


def at_budget(policy: Policy, num_layers: int, share: float) -> Policy:
    """The policy whose visual share, averaged over the decoder layers, is ``share`` on a model of
    ``num_layers``; its other arguments stay. ST3 keeps its shape (:meth:`ST3.for_budget`), others
    are moved along the argument that says how much they drop; one that can only drop at whole
    layers gets the nearest one.

    Raises:
        ValueError: a share that the policy cannot have, or a policy without such an argument.
    """
    check_share("the budget", share)
    if isinstance(policy, NoTrim):
        raise ValueError("policy none keeps every visual token: it has no budget")
    own = getattr(policy, "at_budget", None)
    if own is not None:
        made: Policy = own(num_layers, share)
        return made
    if isinstance(policy, Random):
        return dataclasses.replace(policy, like=at_budget(policy.like, num_layers, share))
    if isinstance(policy, ST3):
        shape = ST3.for_budget(
            num_layers, share, first_layer=policy.first_layer, stride=policy.stride
        )
        return dataclasses.replace(
            policy, first_drop=shape.first_drop, final_keep=shape.final_keep, ratio=None
        )
    fields = {field.name for field in dataclasses.fields(policy)}
    for name in _SHARES:
        if name in fields and isinstance(getattr(policy, name), int | float):
            return _bisect(policy, name, num_layers, share)
    if _LAYER in fields:
        return _nearest_layer(policy, num_layers, share)
    raise ValueError(
        f"policy {policy} cannot be set to a budget: it has none of the arguments "
        f"{', '.join((*_SHARES, _LAYER))}; give it as it is, without --budgets"
    )


def _mean(policy: Policy, num_layers: int) -> float:
    return policy.schedule(num_layers).mean_share


def _bisect(policy: Policy, name: str, num_layers: int, share: float) -> Policy:
    def made(value: float) -> Policy:
        return dataclasses.replace(policy, **{name: round(value, 12)})

    low, high = _ends(made, num_layers)
    at_low, at_high = _mean(made(low), num_layers), _mean(made(high), num_layers)
    if not min(at_low, at_high) - 1e-9 <= share <= max(at_low, at_high) + 1e-9:
        raise ValueError(
            f"policy {policy} cannot have a mean share of {share:.1%} by its argument {name!r}: "
            f"it reaches {min(at_low, at_high):.1%} to {max(at_low, at_high):.1%} on {num_layers} "
            "decoder layers"
        )
    rising = at_high > at_low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if (_mean(made(middle), num_layers) < share) == rising:
            low = middle
        else:
            high = middle
    return made((low + high) / 2)


def _ends(made: Callable[[float], Policy], num_layers: int) -> tuple[float, float]:
    """0 and 1, or as near as the policy allows."""
    ends = []
    for edge, inward in ((0.0, 1.0), (1.0, -1.0)):
        for step in (0.0, 1e-6, 0.01, 0.05, 0.1):
            try:
                _mean(made(edge + inward * step), num_layers)
            except ValueError:
                continue
            ends.append(edge + inward * step)
            break
        else:
            raise ValueError(f"policy {made(0.5)} cannot be set to a budget")
    return ends[0], ends[1]


def _nearest_layer(policy: Policy, num_layers: int, share: float) -> Policy:
    found: list[tuple[float, Policy]] = []
    for layer in range(1, num_layers):
        made = dataclasses.replace(policy, **{_LAYER: layer})
        found.append((abs(_mean(made, num_layers) - share), made))
    return min(found, key=lambda pair: pair[0])[1]


@dataclasses.dataclass(frozen=True)
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
        """The policy as :func:`st3.policies.parse` reads it."""
        return str(self.policy)

    @property
    def title(self) -> str:
        """The row's name in tables; a random choice stands below the policy it is like."""
        if self.beside is not None:
            return "- random"
        return self.source + ("" if self.budget is None else f" at {100 * self.budget:g}%")


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
                made = at_budget(policy, num_layers, share)
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
