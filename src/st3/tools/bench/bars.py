"""Goals with what was measured against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from st3.tools.common.tables import markdown


@dataclass(frozen=True)
class Bar:
    """One goal.

    Attributes:
        name: what is asked for, of what.
        measured: None if it was not measured.
        goal: the number to reach.
        at_most: whether less is better.
    """

    name: str
    measured: float | None
    goal: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal


def as_markdown(bars: Sequence[Bar]) -> str:
    """A table, one line for each bar."""
    rows = []
    for bar in bars:
        measured = "-" if bar.measured is None else f"{bar.measured:.4g}"
        sign = "at most" if bar.at_most else "at least"
        verdict = {True: "yes", False: "no", None: "not measured"}[bar.met]
        rows.append((bar.name, measured, f"{sign} {bar.goal:g}", verdict))
    return markdown(("goal", "measured", "asked", "met"), rows, left=(0, 3)) + "\n"
