"""Pictures of an evaluation. They need matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from st3.tools.common.palette import color, looks
from st3.tools.common.style import canvas
from st3.tools.eval.data import CAPTION
from st3.tools.eval.summary import Row, Summary

Getter = Callable[[Row], float | None]


def draw_all(summary: Summary, folder: Path, title: str) -> list[Path]:
    """Write ``quality-budget.png``, ``quality-time.png`` and ``quality-bubbles.png``.

    Args:
        summary: of a finished evaluation, with one policy or more beside the untrimmed model.
        folder: exists; files of these names are replaced.
        title: of each picture.

    Returns:
        the files; those whose figures nobody knows (FLOPs, say) are left out.

    Raises:
        ValueError: matplotlib is not installed.
    """
    wanted: tuple[tuple[str, str, Getter, bool], ...] = (
        ("quality-budget.png", "mean visual share over the layers, %", lambda r: r.share, False),
        ("quality-time.png", "measured time of the untrimmed model's, %", lambda r: r.time, False),
        ("quality-bubbles.png", "prefill FLOPs of the untrimmed model's, %; area: KV memory",
         lambda r: r.flops, True),
    )  # fmt: skip
    written = []
    for name, axis, across, bubbles in wanted:
        if any(across(row) is not None for rows in summary.rows.values() for row in rows):
            draw(summary, folder / name, across, axis, title, bubbles)
            written.append(folder / name)
    return written


_UNITS = {
    "accuracy": "right, %",
    "loyal_answers": "as untrimmed, %",
    "recall": "objects named, %",
    "cider": "CIDEr-D x 10",
}


def main_metric(kind: str, row: Row) -> str:
    """What stands for the quality of a kind: right answers (without labels: the untrimmed ones),
    objects named, or CIDEr-D.

    Args:
        kind: one of :data:`~st3.tools.eval.data.KINDS`.
        row: any row of that kind.
    """
    if kind != CAPTION:
        return "accuracy" if "accuracy" in row.values else "loyal_answers"
    return "recall" if "recall" in row.values else "cider"


def draw(
    summary: Summary, path: Path, across: Getter, axis: str, title: str, bubbles: bool = False
) -> None:
    """Quality against ``across``, a panel for each kind of items; random choice as hollow
    triangles, tied to the method whose counts it has; the untrimmed model as a line.

    Args:
        summary: of a finished evaluation.
        path: of the PNG.
        across: what the horizontal axis shows of a row, as a share; None: the row is left out.
        axis: the label of that axis.
        title: of the picture.
        bubbles: circles whose area is the KV memory, in place of markers with intervals.

    Raises:
        ValueError: matplotlib is not installed.
    """
    sources = _sources(summary)
    chosen = looks(sources)
    wide = min(2, len(summary.rows))
    high = (len(summary.rows) + wide - 1) // wide
    with canvas((9.6, 3.9 * ((len(summary.rows) + 1) // 2) + 0.9)) as figure:
        panels: Any = figure.subplots(high, wide, squeeze=False)
        for panel in panels.flat[len(summary.rows) :]:
            panel.set_visible(False)
        for panel, (kind, rows) in zip(panels.flat, summary.rows.items(), strict=False):
            _panel(panel, kind, rows, across, chosen, bubbles)
            panel.set_title(f"{kind} ({summary.items[kind]})")
            panel.set_xlabel(axis)
        _legend(figure, chosen, bubbles)
        figure.suptitle(title)
        figure.savefig(path, dpi=110)


def _panel(
    panel: Any, kind: str, rows: Sequence[Row], across: Getter,
    chosen: dict[str, tuple[str, str]], bubbles: bool,
) -> None:  # fmt: skip
    panel.grid()
    name = main_metric(kind, rows[0])
    scale = 10 if name == "cider" else 100
    top = scale * rows[0].values[name].value
    panel.axhline(top, color=color("none"), linewidth=1, linestyle=":")
    if bubbles:
        panel.scatter([100], [top], s=_area(rows[0]), color=color("none"), alpha=0.5)
    places = {row.entry.label: across(row) for row in rows}
    heights = {row.entry.label: scale * row.values[name].value for row in rows}
    for source, (shade, marker) in chosen.items():
        own = [row for row in rows if row.entry.source == source and across(row) is not None]
        own.sort(key=lambda row: across(row) or 0.0)
        xs = [100 * (across(row) or 0.0) for row in own]
        ys = [scale * row.values[name].value for row in own]
        if len(own) > 1:
            panel.plot(xs, ys, color=shade, linewidth=1.2, zorder=2)
        for x, y, row in zip(xs, ys, own, strict=True):
            one = row.values[name]
            if not bubbles:
                panel.plot([x, x], [scale * one.low, scale * one.high], color=shade,
                           linewidth=0.9, alpha=0.55, zorder=1)  # fmt: skip
            size = _area(row) if bubbles else 46
            panel.scatter([x], [y], s=size, marker="o" if bubbles else marker, color=shade,
                          alpha=0.6 if bubbles else 1, linewidths=0.6, zorder=3)  # fmt: skip
    for row in rows:
        beside, at = row.entry.beside, across(row)
        if beside is None or at is None:
            continue
        height = heights[row.entry.label]
        other = places.get(beside)
        if other is not None:
            pair = [100 * other, 100 * at], [heights[beside], height]
            panel.plot(*pair, color=color("random"), linewidth=0.6, alpha=0.7, zorder=1)
        panel.scatter([100 * at], [height], s=26, marker="^", facecolors="none",
                      edgecolors=color("random"), linewidths=1.1, zorder=4)  # fmt: skip
    panel.set_ylabel(_UNITS[name])


def _area(row: Row) -> float:
    """Of a bubble, in square points: KV memory."""
    return 700 * row.kv


def _sources(summary: Summary) -> list[str]:
    rows = next(iter(summary.rows.values()))
    return list(
        dict.fromkeys(
            row.entry.source
            for row in rows
            if row.entry.beside is None and row.entry.source != "none"
        )
    )


def _legend(figure: Any, chosen: dict[str, tuple[str, str]], bubbles: bool) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=shade, marker="o" if bubbles else mark, linestyle="", markersize=7,
               label=source)
        for source, (shade, mark) in chosen.items()
    ]  # fmt: skip
    entries.append(
        Line2D([], [], color=color("random"), marker="^", linestyle="", markersize=6,
               markerfacecolor="none", label="random at equal counts")
    )  # fmt: skip
    entries.append(Line2D([], [], color=color("none"), linestyle=":", label="untrimmed"))
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
