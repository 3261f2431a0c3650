"""A workload's result as a picture. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from st3.tools.bench.report import summary
from st3.tools.bench.suite import Result
from st3.tools.common.palette import LINES, looks
from st3.tools.common.style import canvas


def draw(result: Result, path: Path, where: str) -> None:
    """Write bars of TTFT and TPOT (of the prefill, where nothing was generated), KV bytes over the
    steps, and speed-up against the FLOPs ratio.
    Args:
        where: the conditions, for the line below.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figures = [summary(result, row) for row in result.rows]
    generated = bool(result.reference.generations)
    # A single point beside the untrimmed model's compares nothing.
    points = sum(row.flops_ratio is not None for row in result.rows)
    compared = bool(result.reference.prefill) and points > 2
    with canvas((13, 4.6), font=8) as figure:
        axes: Any = figure.subplots(1, (3 if generated else 1) + compared, squeeze=False)[0]
        if generated:
            _bars(axes[0], result, figures, "ttft_s", "TTFT")
            _bars(axes[1], result, figures, "tpot_s", "TPOT")
            axes[1].set_yticklabels([])
            _kv(axes[2], result)
        else:
            _bars(axes[0], result, figures, "prefill_s", "prefill")
        if compared:
            _gains(axes[-1], result, figures)
        figure.suptitle(f"{result.subject}: {result.workload.title}")
        figure.supxlabel(where, fontsize=8)
        figure.savefig(path, dpi=150)


def _labels(result: Result) -> list[str]:
    return [row.label for row in result.rows]


def _bars(axis: Any, result: Result, figures: list[dict[str, Any]], key: str, title: str) -> None:
    labels = _labels(result)
    seconds = [figure[key] or 0.0 for figure in figures]
    scale, unit, digits = (1, "s", 2) if max(seconds) >= 1 else (1e3, "ms", 1)
    values = [scale * value for value in seconds]
    colours = [looks(labels)[name][0] for name in labels]
    shown = ["\n".join(textwrap.wrap(name.replace(",", ", "), 26)) for name in labels]
    bars = axis.barh(shown, values, color=colours, height=0.65)
    axis.bar_label(bars, fmt=f"%.{digits}f", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.locator_params(axis="x", nbins=4)  # long numbers would run into each other
    axis.set_title(f"{title}, {unit}")


def _kv(axis: Any, result: Result) -> None:
    look = looks(_labels(result))
    for row in result.rows:
        if row.footprint is None:
            continue
        for held, style in ((row.footprint.kv_live, "-"), (row.footprint.kv_allocated, ":")):
            axis.plot([b / 2**20 for b in held], style, color=look[row.label][0], linewidth=1.6)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("decode step")
    axis.set_title("KV cache, MiB: live (line), allocated (dots)")


def _gains(axis: Any, result: Result, figures: list[dict[str, Any]]) -> None:
    look = looks(_labels(result))
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
    axis.plot([1, top * 1.05], [1, top * 1.05], color=LINES, linewidth=1, zorder=0)
    axis.set_xlabel("FLOPs ratio, untrimmed / trimmed")
    axis.set_title("prefill speed-up (line: as the FLOPs)")
    if axis.get_legend_handles_labels()[1]:
        axis.legend()
