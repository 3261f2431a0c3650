"""A first setting for a model, read off its curves, with the reasons in words.

The rules are plain thresholds of this project, not the paper's, and they see attention alone: they
say where to start a search, not what a setting costs. Quality has to be measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from st3.methods.policies.balanced import Balanced
from st3.methods.schedule import Anneal
from st3.tools.see.result import Analysis

HALF = 0.5
LAZY = 0.9  # cosine similarity with the layer before from which on a layer counts as lazy
LITTLE = 0.05  # share of a layer's attention under which the image counts as left alone


@dataclass(frozen=True)
class Suggestion:
    """Where to start.

    Attributes:
        policy: a string for ``--policy``.
        first_layer, stride: for :class:`st3.Balanced`.
        horizon: first layer from which on no layer gives the image more than 5 % of its attention;
            None if there is none.
        tau: annealing period in tokens; None: do not anneal.
        reasons: one sentence or two for each of the four.
        cautions: what the curves speak against.
    """

    policy: str
    first_layer: int
    stride: int
    horizon: int | None
    tau: int | None
    reasons: tuple[str, ...]
    cautions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lazy_layers(analysis: Analysis) -> list[int]:
    """Layers whose attention over the image is nearly that of the layer before."""
    cosine = analysis.typical.previous_cosine
    return [layer for layer in range(1, len(cosine)) if cosine[layer] >= LAZY]


def suggest(analysis: Analysis) -> Suggestion:
    """A first layer, a stride, a horizon and a tau for the default policy.

    Raises:
        ValueError: for a model of fewer than three decoder layers.
    """
    if analysis.num_layers < 3:
        raise ValueError("a suggestion needs at least three decoder layers")
    first, why_first, cautions = _first_layer(analysis)
    stride, why_stride = _stride(analysis, first)
    horizon, why_horizon = _horizon(analysis)
    tau, why_tau = _tau(analysis)
    policy = Balanced(
        first_layer=first,
        stride=stride,
        anneal=Anneal("none") if tau is None else Anneal(tau=tau),
    )
    policy.schedule(analysis.num_layers)
    return Suggestion(
        policy=str(policy),
        first_layer=first,
        stride=stride,
        horizon=horizon,
        tau=tau,
        reasons=(why_first, why_stride, why_horizon, why_tau),
        cautions=tuple(cautions),
    )


def _visual(analysis: Analysis) -> list[float]:
    return [shares[0] for shares in analysis.typical.shares]


def _first_layer(analysis: Analysis) -> tuple[int, str, list[str]]:
    """The first layer from which on the image gets half of its peak or less, on average; where
    there is none, the one whose predecessor ranks the tokens most as the deeper layers do."""
    visual = _visual(analysis)
    count = len(visual)
    last = count - 2  # leaves a layer for at least one more drop
    for layer in range(1, last + 1):
        rest = sum(visual[layer:]) / (count - layer)
        peak = max(visual[:layer])
        if peak > LITTLE and rest <= HALF * peak:
            reason = (
                f"First layer {layer}: before it a layer gives the image up to {peak:.0%} of its "
                f"attention, from it on {rest:.0%} on average, half of that or less."
            )
            return layer, reason, _ranking(analysis, layer)
    overlap = analysis.prefill.overlap
    half = max(1, min(last, count // 2))
    agreement = {
        layer: sum(overlap[layer - 1][layer:]) / (count - layer) for layer in range(1, half + 1)
    }
    layer = max(agreement, key=lambda i: agreement[i])
    reason = (
        f"First layer {layer}: attention on the image does not fall to half of its peak at any "
        f"depth (mean {sum(visual) / count:.0%}). Of the first half of the layers, layer "
        f"{layer - 1} ranks the tokens most as the deeper ones do: their top "
        f"{analysis.keep:.0%} share {agreement[layer]:.0%}."
    )
    caution = (
        "Attention on the image does not fall off with depth, which is what spatial trimming "
        "rests on: expect a cost in quality, keep more (first_drop, final_keep), and measure."
    )
    return layer, reason, [caution, *_ranking(analysis, layer)]


def _ranking(analysis: Analysis, layer: int) -> list[str]:
    row = analysis.prefill.overlap[layer - 1][layer:]
    agreement = sum(row) / len(row)
    if agreement >= 2 * analysis.keep or agreement >= HALF:
        return []
    return [
        f"The ranking read at layer {layer - 1} agrees little with the deeper layers' own: their "
        f"top {analysis.keep:.0%} share {agreement:.0%}, where chance gives {analysis.keep:.0%}. "
        "Compare with the policy random at equal counts."
    ]


def _stride(analysis: Analysis, first: int) -> tuple[int, str]:
    """How far a layer's kept set holds: the largest distance at which half of it is shared."""
    overlap, count = analysis.prefill.overlap, analysis.num_layers
    most = count - first
    held = []
    for distance in range(1, most + 1):
        pairs = [overlap[layer][layer + distance] for layer in range(first - 1, count - distance)]
        held.append(sum(pairs) / len(pairs))
    far = 0
    while far < len(held) and held[far] >= HALF:
        far += 1
    stride = max(1, min(far, most))
    shown = held[stride - 1]
    if far:
        return stride, (
            f"Stride {stride}: layers up to {stride} apart share at least half of their top "
            f"{analysis.keep:.0%} of the visual tokens ({shown:.0%} at that distance), so that one "
            "ranking serves for so many layers."
        )
    return stride, (
        f"Stride 1: even neighbouring layers share only {shown:.0%} of their top "
        f"{analysis.keep:.0%} of the visual tokens, so that the ranking should be renewed at every "
        "layer."
    )


def _horizon(analysis: Analysis) -> tuple[int | None, str]:
    visual = _visual(analysis)
    layer = len(visual)
    while layer and visual[layer - 1] < LITTLE:
        layer -= 1
    if layer == len(visual):
        return None, (
            f"No horizon: the last layer still gives the image {visual[-1]:.0%} of its attention, "
            "so that no depth is seen from which on the image may leave altogether."
        )
    layer = max(layer, 1)
    return layer, (
        f"Horizon {layer}: from layer {layer} on every layer gives the image less than "
        f"{LITTLE:.0%} of its attention; it may leave there (vtw:layer={layer}, or a schedule that "
        "ends at 0)."
    )


def _tau(analysis: Analysis) -> tuple[int | None, str]:
    """Where the share on the image falls to half along the answer, the quarter cosine shall too."""
    if not analysis.lengths:
        return None, "No tau: nothing was generated, annealing is left out."
    visual = [shares[0] for shares in analysis.shares_by_length]
    start = visual[0]
    end = sum(visual[-3:]) / len(visual[-3:])
    for length, share in zip(analysis.lengths, _smooth(visual), strict=True):
        if share <= HALF * start:
            tau = max(1, math.ceil(1.5 * length))
            return tau, (
                f"Tau {tau}: attention on the image starts at {start:.0%} and has fallen to half "
                f"of that after {length:.0f} generated tokens; a quarter cosine of period tau is "
                "at one half after two thirds of tau."
            )
    longest = analysis.longest
    if end >= 0.8 * start:
        return None, (
            f"No tau: after {longest} generated tokens the image still gets {end:.0%} of the "
            f"attention ({start:.0%} at the first), so that annealing (curve=none) is left out."
        )
    tau = math.ceil(1.5 * longest)
    return tau, (
        f"Tau {tau} or more: attention on the image falls from {start:.0%} to {end:.0%} over "
        f"{longest} generated tokens, not to half of it; a quarter cosine of this period is at one "
        "half after them."
    )


def _smooth(values: list[float]) -> list[float]:
    """Running means over three neighbours; the ends over two."""
    return [
        sum(values[max(0, i - 1) : i + 2]) / len(values[max(0, i - 1) : i + 2])
        for i in range(len(values))
    ]
