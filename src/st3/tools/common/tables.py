"""Tables, for pages and for terminals: the only writer of either."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def markdown(
    head: Sequence[str], rows: Iterable[Sequence[object]], left: Collection[int] = (0,)
) -> str:
    """A Markdown table, without a line break behind it.

    Args:
        left: numbers of the columns of words; the others are of figures, set to the right.
    """
    rule = ["---" if number in left else "--:" for number in range(len(head))]
    lines = [_line(head), "|" + "|".join(rule) + "|", *map(_line, rows)]
    return "\n".join(lines)


def console(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    left: Collection[int] = (0,),
    fold: Collection[int] = (),
) -> Table:
    """A table without lines for a rich Console.

    Args:
        left: as in :func:`markdown`.
        fold: numbers of the columns that may be broken where a terminal is narrow.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(head):
        table.add_column(
            escape(name),
            justify="left" if number in left else "right",
            no_wrap=number in left and number not in fold,
            overflow="fold" if number in fold else "ellipsis",  # a name without spaces, too
        )
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
