"""A report for people: as text, as HTML for notebooks, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from st3.methods.laid import Laid

if TYPE_CHECKING:
    from st3.report.report import Report

MIB = 1 << 20
# Readable on the white and on the dark ground of notebooks.
_STYLE = "font-variant-numeric:tabular-nums;border-collapse:collapse"
_LEFT = "text-align:left;padding:2px 1em 2px 0;font-weight:600"
_CELL = "text-align:left;padding:2px 0"


def one_line(report: Report) -> str:
    """``<Report: balanced, 144 visual tokens, 37.0% kept on average, 40 decode steps>``."""
    return (
        f"<Report: {report.policy}, {_counts(report.n_visual)} visual tokens, "
        f"{report.mean_share:.1%} kept on average, {report.steps} decode steps>"
    )


def text(report: Report) -> str:
    """A line for each figure."""
    lines = rows(report)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def rows(report: Report) -> list[tuple[str, str]]:
    """Names and values of the figures, in order."""
    more = " (row 0)" if len(report.kept) > 1 else ""
    lines = [
        ("policy", report.policy),
        ("visual tokens", _counts(report.n_visual) + _images(report.visual_per_image)),
        ("text tokens", _counts(report.n_text)),
        ("kept per layer", _runs(report.kept[0]) + more),
        ("mean share", f"{report.mean_share:.1%} of the visual tokens over the layers"),
    ]
    if isinstance(report.schedule, Laid):
        lines += report.schedule.departures
    if report.lacks_tower:
        lines.append(
            ("ranked by", "the embeddings: the vision tower's attention is not known here")
        )
    flops, ratio = report.prefill_flops, report.prefill_flops_ratio
    if flops is not None and ratio is not None:
        lines.append(("prefill FLOPs", f"{flops:.3g} ({ratio:.1%} of untrimmed)"))
    return [
        *lines,
        ("decode steps", str(report.steps)),
        ("KV live", _kv(report, report.kv_live_bytes)),
        ("KV allocated", _kv(report, report.kv_allocated_bytes)),
        ("KV mean", f"live {report.kv_mean_ratio:.1%}, allocated "
                    f"{report.kv_mean_allocated_ratio:.1%} of untrimmed"),
    ]  # fmt: skip


def html(report: Report) -> str:
    """A table of the figures, and a chart that needs nothing but the browser."""
    cells = "".join(
        f'<tr><th style="{_LEFT}">{escape(name)}</th><td style="{_CELL}">{escape(value)}</td></tr>'
        for name, value in rows(report)
    )
    return f'<table style="{_STYLE}">{cells}</table>{_bars(report.kept[0])}'


def _bars(kept: Sequence[int]) -> str:
    """A bar for each layer, as SVG in the colour of the text."""
    most = max(max(kept, default=0), 1)
    wide = 10 * len(kept)
    bars = "".join(
        f'<rect x="{10 * layer + 1}" y="{60 - 60 * count / most:.1f}" width="8" '
        f'height="{60 * count / most:.1f}"><title>layer {layer}: {count}</title></rect>'
        for layer, count in enumerate(kept)
    )
    said = escape(f"Visual tokens by layer: {_runs(kept)}")
    return (
        f'<svg viewBox="0 0 {wide} 60" width="{min(480, 2 * wide)}" height="60" role="img" '
        f'preserveAspectRatio="none" fill="currentColor" fill-opacity="0.6" aria-label="{said}">'
        f"{bars}</svg><div><small>visual tokens that each of {len(kept)} layers sees</small></div>"
    )


def plot(report: Report, axes: Any = None) -> Any:
    """See :meth:`~st3.report.Report.plot`."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'st3[plot]'") from error
    if axes is None:
        axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")[1]
    layers = report.schedule.num_layers
    edges = [layer - 0.5 for layer in range(layers + 1)]
    for number, kept in enumerate(report.kept):
        label = report.policy if len(report.kept) == 1 else f"row {number}"
        axes.stairs(kept, edges, baseline=None, linewidth=2, label=label)
    most = max(report.n_visual, default=0)
    axes.hlines(most, edges[0], edges[-1], linestyle=":", color="0.5", label="untrimmed")
    axes.set(
        xlabel="decoder layer",
        ylabel="visual tokens",
        xlim=(edges[0], edges[-1]),
        ylim=(0, 1.08 * max(most, 1)),
        title=f"{report.policy}: {report.mean_share:.0%} of the visual tokens on average",
    )
    axes.legend()
    return axes


def _kv(report: Report, size: int) -> str:
    untrimmed = report.kv_untrimmed_bytes
    share = f" ({size / untrimmed:.1%} of untrimmed {untrimmed / MIB:.2f})" if untrimmed else ""
    return f"{size / MIB:.2f} MiB{share}"


def _counts(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))


def _images(rows: tuple[tuple[int, ...], ...]) -> str:
    most = max(map(len, rows))
    return f" in up to {most} images a row" if most > 1 else ""


def _runs(values: Sequence[int]) -> str:
    """``3 x 576, 4 x 288, ...``: equal neighbours put together."""
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][1] == value:
            parts[-1][0] += 1
        else:
            parts.append([1, value])
    return ", ".join(f"{count} x {value}" for count, value in parts)
