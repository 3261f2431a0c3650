"""Which stored entries a decode step sees: a pure function of counts, schedule and step.

Nothing is accumulated, so that crops, beams and copies of a cache need no history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from st3.methods.schedule import Schedule

FOREVER = 1 << 40  # a step behind which no curve moves


@dataclass(frozen=True)
class RowEntries:
    """What a layer stores of one row. Columns are counted from the layer's first one ever stored.

    Attributes:
        pad: the row's first column; what stands before it is padding.
        visual: visual entries, the first of the row.
        ordered: how many of them stand by rising importance: all, or none where nothing anneals.
        budgets: the original visual tokens that shares are taken of: one number, or one per image.
    """

    pad: int
    visual: int
    ordered: int
    budgets: tuple[int, ...]

    @property
    def text(self) -> int:
        """First column behind the visual entries."""
        return self.pad + self.visual

    def moved(self, columns: int) -> RowEntries:
        """The same row, begun ``columns`` later."""
        return replace(self, pad=self.pad + columns)


def visible(schedule: Schedule, layer: int, budgets: Sequence[int], step: int) -> int:
    """The visual entries that ``layer`` shows of a row at decode step ``step``."""
    return sum(schedule.visible(layer, n, step) for n in budgets)


def row_starts(
    rows: Sequence[RowEntries], schedule: Schedule, layer: int, step: int
) -> tuple[int, ...]:
    """First column of each row that decode step ``step`` sees in ``layer``."""
    different = {row.budgets for row in rows}  # rows of a batch are often alike
    shown = {budgets: visible(schedule, layer, budgets, step) for budgets in different}
    return tuple(row.text - shown[row.budgets] for row in rows)
