"""The finished analysis: means as plain lists, ready for JSON and for drawing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from st3.tools.see.collect import DECODE, GROUPS, PREFILL, Collector

Row = list[float]
Matrix = list[Row]


LAZY = 0.9
"""Cosine similarity with the layer before from which on a layer counts as lazy."""


@dataclass(frozen=True)
class Phase:
    """Means over the prefills, or over the decode steps; layers are counted from 0.

    See :class:`~st3.tools.see.collect.Collector` for what is measured.
    """

    shares: Matrix
    cosine: Matrix
    previous_cosine: Row
    previous_js: Row
    high: Row
    holding: Row
    overlap: Matrix


@dataclass(frozen=True)
class Analysis:
    """What a model looks at, over a set of prompts.

    Attributes:
        prompts, decode_steps: how many were watched.
        visual_tokens: of a prompt, mean.
        keep: share of the visual tokens in a kept set.
        prefill: over the prefills.
        decode: over the decode steps; None if nothing was generated.
        rows, columns: [L][12] visual attention by place in the image, 1 is even; where ``placed``
            is false, by place in the order of the visual tokens.
        lengths: middles of the bins of generated tokens, for what follows.
        shares_by_length: [bins][4], mean over the layers.
        visual_by_length: [bins][L], the share on visual tokens.
        same_as_first, same_as_before: [bins][L].
        longest: decode steps of the longest answer.
    """

    prompts: int
    decode_steps: int
    visual_tokens: float
    keep: float
    prefill: Phase
    decode: Phase | None
    placed: bool
    rows: Matrix
    columns: Matrix
    lengths: Row
    shares_by_length: Matrix
    visual_by_length: Matrix
    same_as_first: Matrix
    same_as_before: Matrix
    longest: int

    @property
    def num_layers(self) -> int:
        return len(self.prefill.shares)

    @property
    def typical(self) -> Phase:
        """The decode steps where there are any, or the prefills."""
        return self.decode or self.prefill

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``groups`` names the columns of the shares."""
        return {"groups": list(GROUPS), **dataclasses.asdict(self)}


def finish(collector: Collector) -> Analysis:
    """The means of all that a collector has heard.

    Raises:
        ValueError: if it has heard nothing.
    """
    if not collector.prompts:
        raise ValueError("nothing was analysed: no prompt with an image was run")
    passes = sum(collector.passes)
    lengths, shares = collector.shares_by_length.means()
    return Analysis(
        prompts=collector.prompts,
        decode_steps=collector.passes[DECODE],
        visual_tokens=collector.visual_tokens / collector.prompts,
        keep=collector.keep,
        prefill=_phase(collector, PREFILL),
        decode=_phase(collector, DECODE) if collector.passes[DECODE] else None,
        placed=collector.placed,
        rows=(collector.rows / passes).tolist(),
        columns=(collector.columns / passes).tolist(),
        lengths=lengths,
        shares_by_length=shares.mean(1).tolist(),
        visual_by_length=shares[:, :, 0].tolist(),
        same_as_first=collector.same_as_first.means()[1].tolist(),
        same_as_before=collector.same_as_before.means()[1].tolist(),
        longest=collector.longest,
    )


def _phase(collector: Collector, phase: int) -> Phase:
    count = collector.passes[phase]
    cosine = collector.cosine[phase] / count
    return Phase(
        shares=(collector.shares[phase] / count).tolist(),
        cosine=cosine.tolist(),
        previous_cosine=[0.0, *cosine.diagonal(-1).tolist()],
        previous_js=(collector.divergence[phase] / count).tolist(),
        high=(collector.high[phase] / count).tolist(),
        holding=(collector.holding[phase] / count).tolist(),
        overlap=(collector.overlap[phase] / count).tolist(),
    )


def lazy_layers(analysis: Analysis) -> list[int]:
    """Layers whose attention over the image is nearly that of the layer before."""
    cosine = analysis.typical.previous_cosine
    return [layer for layer in range(1, len(cosine)) if cosine[layer] >= LAZY]
