"""The analysis as pictures. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from st3.tools.common.style import DARK, LIGHT, Theme, canvas, check_installed
from st3.tools.see.collect import PLACES
from st3.tools.see.result import LAZY, Analysis, Matrix, lazy_layers

THEMES = (LIGHT, DARK)
MAP = "cividis"  # made for readers with any colour vision
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Figure:
    """A picture in both themes, with what it says in words.

    Attributes:
        name: of its file.
        png: the PNG by theme name.
        head, rows: the numbers behind it, for a table.
    """

    name: str
    title: str
    text: str
    png: dict[str, bytes]
    head: list[str]
    rows: list[list[str]]


Draw = Callable[[Any, Theme], None]


def figures(analysis: Analysis) -> Iterator[Figure]:
    """All figures, in the order of the page.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_installed()
    for make in (_shares, _by_length, _lazy, _pairs, _high, _overlap, _kept_over_time, _places):
        figure = make(analysis)
        if figure is not None:
            yield figure


def _draw(title: str, draw: Draw, high: float = 4.1, shades: bool = False) -> dict[str, bytes]:
    """A PNG in each theme. ``shades``: it has a colour map, whose shades must not be merged."""
    pictures = {}
    for theme in THEMES:
        buffer, small = io.BytesIO(), io.BytesIO()
        with canvas((7.4, high + 0.4), font=12, theme=theme) as figure:  # for phones, too
            figure.suptitle(title)
            draw(figure, theme)
            figure.savefig(buffer, dpi=110, format="png")
        picture = Image.open(buffer).convert("RGB")
        if not shades:  # lines have few colours: a third of the size
            picture = picture.quantize(160, dither=Image.Dither.NONE)
        picture.save(small, "png", optimize=True)
        pictures[theme.name] = small.getvalue()
    return pictures


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _finish(axis: Any, xlabel: str, ylabel: str) -> None:
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.4, axis="y")


def _layer_ticks(axis: Any, count: int) -> None:
    step = max(1, -(-count // 8))
    axis.set_xticks(range(0, count, step))


def _lines(axis: Any, theme: Theme, x: Any, rows: Matrix, names: tuple[str, ...]) -> None:
    for place, name in enumerate(names):
        values = [row[place] for row in rows]
        axis.plot(x, values, STYLES[place], color=theme.groups[place], lw=2.2, label=name)


GROUP_NAMES = ("visual tokens", "system", "question", "generated text")


def _shares(analysis: Analysis) -> Figure:
    phases = [("prefill", analysis.prefill)]
    if analysis.decode is not None:
        phases.append(("decode steps", analysis.decode))
    count = analysis.num_layers

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
        for axis, (name, phase) in zip(axes, phases, strict=True):
            _lines(axis, theme, range(count), phase.shares, GROUP_NAMES)
            axis.set_title(name)
            _layer_ticks(axis, count)
            _finish(axis, "decoder layer", "attention" if axis is axes[0] else "")
            axis.set_ylim(0, 1)
            _percent(axis)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)

    head = ["layer", *(f"{name}: {group}" for name, _ in phases for group in GROUP_NAMES)]
    rows = [
        [str(layer), *(f"{v:.1%}" for _, phase in phases for v in phase.shares[layer])]
        for layer in range(count)
    ]
    title = "Where attention goes, by layer"
    return Figure(
        "shares-by-layer",
        title,
        "Share of the last token's attention on visual tokens, the text before them, the rest of "
        "the prompt and generated text, mean over heads.",
        _draw(title, draw),
        head,
        rows,
    )


def _by_length(analysis: Analysis) -> Figure | None:
    if not analysis.lengths:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        axis = figure.subplots()
        _lines(axis, theme, analysis.lengths, analysis.shares_by_length, GROUP_NAMES)
        _finish(axis, "generated tokens", "attention, mean over layers")
        axis.set_ylim(0, 1)
        axis.set_xlim(left=0)
        _percent(axis)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)

    rows = [
        [f"{length:g}", *(f"{v:.1%}" for v in shares)]
        for length, shares in zip(analysis.lengths, analysis.shares_by_length, strict=True)
    ]
    title = "Where attention goes, by generated length"
    return Figure(
        "shares-by-length",
        title,
        "The same shares, mean over the layers, as the answer grows.",
        _draw(title, draw, high=3.8),
        ["generated tokens", *GROUP_NAMES],
        rows,
    )


def _lazy(analysis: Analysis) -> Figure:
    phase, count, lazy = analysis.typical, analysis.num_layers, lazy_layers(analysis)

    def draw(figure: Any, theme: Theme) -> None:
        axis = figure.subplots()
        x = range(1, count)
        for values, style, name, color in (
            (phase.previous_cosine, "-o", "cosine", theme.groups[0]),
            (phase.previous_js, "--s", "Jensen-Shannon", theme.groups[2]),
        ):
            axis.plot(x, values[1:], style, color=color, lw=2.2, ms=5, label=name)
        for layer in lazy:
            axis.axvspan(layer - 0.5, layer + 0.5, color=theme.groups[1], alpha=0.18, lw=0)
        axis.axhline(LAZY, color=theme.lines, lw=1.2, ls=":")
        axis.set_ylim(0, 1.04)
        _layer_ticks(axis, count)
        _finish(axis, "decoder layer", "similarity, 1 is equal")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    words = ", ".join(map(str, lazy)) if lazy else "none"
    title = "Similarity with the layer before; lazy layers"
    return Figure(
        "similarity-with-previous",
        title,
        "Of the attention over the visual tokens. Jensen-Shannon similarity is 1 minus the "
        f"divergence in bits. Shaded: lazy layers, cosine {LAZY} or more: {words}.",
        _draw(title, draw, high=3.8),
        ["layer", "cosine", "Jensen-Shannon"],
        [
            [str(i), f"{phase.previous_cosine[i]:.3f}", f"{phase.previous_js[i]:.3f}"]
            for i in range(1, count)
        ],
    )


def _matrices(pairs: list[tuple[str, Matrix]], unit: str) -> Draw:
    """The diagonal is 1 in every one of them: the colours are spread over the others."""
    others = [
        value
        for _, matrix in pairs
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if i != j
    ]
    low, high = min(others, default=0.0), max(others, default=1.0)
    if high - low < 0.05:
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots(1, len(pairs), squeeze=False)[0]
        image = None
        for axis, (name, matrix) in zip(axes, pairs, strict=True):
            image = axis.imshow(matrix, vmin=low, vmax=high, cmap=MAP, origin="lower")
            axis.set_title(name)
            axis.set_xlabel("decoder layer")
            axis.set_ylabel("decoder layer" if axis is axes[0] else "")
            step = max(1, -(-len(matrix) // 8))
            axis.set_xticks(range(0, len(matrix), step))
            axis.set_yticks(range(0, len(matrix), step))
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9, extend="max")
        bar.set_label(unit)

    return draw


def _table(matrix: Matrix) -> tuple[list[str], list[list[str]]]:
    head = ["layer", *map(str, range(len(matrix)))]
    return head, [[str(i), *(f"{v:.2f}" for v in row)] for i, row in enumerate(matrix)]


def _pairs(analysis: Analysis) -> Figure:
    pairs = [("prefill", analysis.prefill.cosine)]
    if analysis.decode is not None:
        pairs.append(("decode steps", analysis.decode.cosine))
    head, rows = _table(pairs[-1][1])
    title = "Similarity of all layer pairs"
    return Figure(
        "similarity-of-layers",
        title,
        "Cosine similarity of two layers' attention over the visual tokens. The table is of the "
        f"{pairs[-1][0]}.",
        _draw(title, _matrices(pairs, "cosine, 1 is equal"), high=3.6, shades=True),
        head,
        rows,
    )


def _high(analysis: Analysis) -> Figure:
    phase, count = analysis.typical, analysis.num_layers

    def draw(figure: Any, theme: Theme) -> None:
        axis = figure.subplots()
        for values, style, name, color in (
            (phase.high, "-o", "above an even share of the row", theme.groups[0]),
            (phase.holding, "--s", "that hold 90 % of the visual attention", theme.groups[2]),
        ):
            axis.plot(range(count), values, style, color=color, lw=2.2, ms=5, label=name)
        axis.set_ylim(bottom=0)
        _layer_ticks(axis, count)
        _finish(axis, "decoder layer", f"tokens of {analysis.visual_tokens:.0f}")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    title = "Visual tokens with high attention, by depth"
    return Figure(
        "high-attention-tokens",
        title,
        "How many visual tokens get more than an even share of the whole row's attention (1 over "
        "all keys), and the fewest that together hold nine tenths of the visual attention; means "
        "over passes.",
        _draw(title, draw, high=3.8),
        ["layer", "above an even share", "hold 90 %"],
        [[str(i), f"{phase.high[i]:.1f}", f"{phase.holding[i]:.1f}"] for i in range(count)],
    )


def _overlap(analysis: Analysis) -> Figure:
    pairs = [("prefill", analysis.prefill.overlap)]
    if analysis.decode is not None:
        pairs.append(("decode steps", analysis.decode.overlap))
    head, rows = _table(pairs[0][1])
    unit = f"shared part of the top {analysis.keep:.0%}"
    title = "Overlap of kept sets between layers"
    return Figure(
        "kept-sets-by-layer",
        title,
        f"A layer's kept set is the {analysis.keep:.0%} of the visual tokens that it attends to "
        f"most; drawn is the part that two layers share. Chance gives {analysis.keep:.0%}. The "
        "table is of the prefill.",
        _draw(title, _matrices(pairs, unit), high=3.6, shades=True),
        head,
        rows,
    )


def _kept_over_time(analysis: Analysis) -> Figure | None:
    if not analysis.lengths:
        return None
    first = [sum(row) / len(row) for row in analysis.same_as_first]
    before = [sum(row) / len(row) for row in analysis.same_as_before]

    def draw(figure: Any, theme: Theme) -> None:
        axis = figure.subplots()
        for values, style, name, color in (
            (before, "-", "with the step before", theme.groups[0]),
            (first, "--", "with the prefill", theme.groups[2]),
        ):
            axis.plot(analysis.lengths, values, style, color=color, lw=2.2, label=name)
        axis.axhline(analysis.keep, color=theme.ink, lw=1, ls=":", label="chance")
        axis.set_ylim(0, 1)
        axis.set_xlim(left=0)
        _percent(axis)
        _finish(axis, "generated tokens", "shared part of the kept set")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    title = "Overlap of kept sets between steps"
    return Figure(
        "kept-sets-by-length",
        title,
        "Whether a step would keep the tokens that the prefill would keep, and those of the step "
        "before; mean over the layers.",
        _draw(title, draw, high=3.8),
        ["generated tokens", "with the step before", "with the prefill"],
        [
            [f"{n:g}", f"{b:.1%}", f"{f:.1%}"]
            for n, b, f in zip(analysis.lengths, before, first, strict=True)
        ],
    )


def _places(analysis: Analysis) -> Figure:
    parts = [("from top to bottom", analysis.rows)]
    if analysis.placed:
        parts.append(("from left to right", analysis.columns))
    else:
        parts = [("in the order of the visual tokens", analysis.rows)]
    count = analysis.num_layers
    groups = [range(count // 2), range(count // 2, count)]
    means = [
        [[sum(matrix[i][p] for i in group) / len(group) for p in range(PLACES)] for group in groups]
        for _, matrix in parts
    ]
    names = [f"layers {g[0]} to {g[-1]}" for g in groups]
    top = max(v for lines in means for line in lines for v in line)

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axis, (name, _), lines in zip(axes, parts, means, strict=True):
            for place, values in enumerate(lines):
                axis.plot(
                    range(1, PLACES + 1),
                    values,
                    "-o" if place == 0 else "--s",
                    color=theme.groups[2 * place],
                    lw=2.2,
                    ms=5,
                    label=names[place],
                )
            axis.axhline(1, color=theme.ink, lw=1, ls=":")
            axis.set_title(name)
            axis.set_ylim(0, 1.08 * top)
            axis.set_xticks(range(1, PLACES + 1))
            _finish(
                axis, f"place, 1 to {PLACES}", "attention, 1 is even" if axis is axes[0] else ""
            )
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)

    head = ["twelfth", *(f"{part}, {name}" for part, _ in parts for name in names)]
    rows = [
        [str(p + 1), *(f"{line[p]:.2f}" for lines in means for line in lines)]
        for p in range(PLACES)
    ]
    text = (
        "Attention on visual tokens by their place in the image, over what an even spread would "
        "give; all passes."
    )
    if not analysis.placed:
        text += " Where this model's visual tokens lie in the image is not known: by their order."
    title = "Visual position bias"
    return Figure("position-bias", title, text, _draw(title, draw), head, rows)
