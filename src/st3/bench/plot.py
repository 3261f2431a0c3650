"""A workload's result as a picture. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st3.bench.methods import ATTACHED, OWN_CACHE, UNTOUCHED
from st3.bench.report import summary
from st3.bench.suite import Result

# Okabe and Ito's colours, told apart by colour-blind people as well, and markers besides. A method
# has the same in all panels and pictures; what is not named here takes the spare ones in order.
_STYLES = {
    UNTOUCHED: ("#4d4d4d", "o"),
    OWN_CACHE: ("#9a9a9a", "s"),
    "st3": ("#0072b2", "D"),
    "random": ("#cc79a7", "^"),
    "fastv": ("#e69f00", "v"),
    "fastv (authors' way)": ("#d55e00", "P"),
    "vtw": ("#009e73", "*"),
    ATTACHED: ("#8c510a", "X"),
}
_SPARE = (("#56b4e9", "<"), ("#5e3c99", ">"), ("#b2182b", "p"), ("#01665e", "h"), ("#7a7a00", "d"))
_PAPER, _INK, _LINES = "#fcfcf9", "#1a1a1a", "#b8b8b8"


def draw(result: Result, path: Path, where: str) -> None:
    """Write bars of TTFT and TPOT (of the prefill, where nothing was generated), KV bytes over the
    steps, and speed-up against the FLOPs ratio. The ground is light by itself, so that the picture
    reads the same on light and dark pages.

    Args:
        where: the conditions, for the line below.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'st3[plot]'") from error
    figure = Figure(figsize=(13, 4.6), facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figures = [summary(result, row) for row in result.rows]
    generated = bool(result.reference.generations)
    axes: Any = figure.subplots(1, 4 if generated else 2)
    for axis in axes:
        _dress(axis)
    if generated:
        _bars(axes[0], result, figures, "ttft_s", "TTFT, ms")
        _bars(axes[1], result, figures, "tpot_s", "TPOT, ms")
        axes[1].set_yticklabels([])
        _kv(axes[2], result)
    else:
        _bars(axes[0], result, figures, "prefill_s", "prefill, ms")
    if result.reference.prefill:
        _gains(axes[-1], result, figures)
    else:
        axes[-1].set_visible(False)
    figure.suptitle(f"{result.subject}: {result.workload.title}", color=_INK, fontsize=12)
    figure.supxlabel(where, color=_INK, fontsize=7)
    figure.savefig(path, dpi=150, facecolor=_PAPER)


def styles(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method. A policy with arguments takes its name's, if that is free:
    ``st3:stride=2`` looks like ``st3`` where there is no other."""
    spare = iter(_SPARE * (1 + len(labels)))
    chosen = {label: _STYLES[label] for label in labels if label in _STYLES}
    for label in labels:
        plain = _STYLES.get(label.partition(":")[0])
        if label not in chosen:
            free = plain is not None and plain not in chosen.values()
            chosen[label] = plain if plain is not None and free else next(spare)
    return chosen


def _dress(axis: Any) -> None:
    axis.set_facecolor(_PAPER)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_LINES)
    axis.tick_params(colors=_INK, labelsize=8)
    axis.title.set_color(_INK)


def _labels(result: Result) -> list[str]:
    return [row.label for row in result.rows]


def _bars(axis: Any, result: Result, figures: list[dict[str, Any]], key: str, title: str) -> None:
    labels = _labels(result)
    values = [1e3 * (figure[key] or 0.0) for figure in figures]
    bars = axis.barh(
        labels, values, color=[styles(labels)[name][0] for name in labels], height=0.65
    )
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8, color=_INK)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_title(title, fontsize=10)


def _kv(axis: Any, result: Result) -> None:
    look = styles(_labels(result))
    for row in result.rows:
        if row.footprint is None:
            continue
        for held, style in ((row.footprint.kv_live, "-"), (row.footprint.kv_allocated, ":")):
            axis.plot([b / 2**20 for b in held], style, color=look[row.label][0], linewidth=1.6)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("decode step", fontsize=8, color=_INK)
    axis.set_title("KV cache, MiB: live (line), allocated (dots)", fontsize=10)


def _gains(axis: Any, result: Result, figures: list[dict[str, Any]]) -> None:
    look = styles(_labels(result))
    top = 1.0
    for row, figure in zip(result.rows, figures, strict=True):
        gain = figure["speed_up"]["prefill"]
        if row is result.reference or gain is None or row.flops_ratio is None:
            continue
        axis.plot(
            row.flops_ratio,
            gain["paired"],
            look[row.label][1],
            color=look[row.label][0],
            markersize=8,
            label=row.label,
        )
        top = max(top, row.flops_ratio, gain["paired"])
    axis.plot([1, top * 1.05], [1, top * 1.05], color=_LINES, linewidth=1, zorder=0)
    axis.set_xlabel("FLOPs ratio, untrimmed / trimmed", fontsize=8, color=_INK)
    axis.set_title("prefill speed-up (line: as the FLOPs)", fontsize=10)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, frameon=False, labelcolor=_INK)
