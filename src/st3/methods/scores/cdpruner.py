"""Tokens that fit the question and are unlike each other: CDPruner's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.picks import Picks, similarity, strangers
from st3.methods.scores.registry import register
from st3.methods.scores.relevance import Relevance

# A token that the picked ones explain up to this share of the largest is explained.
EXHAUSTED = 1e-6


@register
@dataclass(frozen=True)
class ConditionalDPP:
    """Relevant and unlike each other: greedy maximum of a determinantal point process on the
    kernel ``r_i * cosine(i, j) * r_j``.

    The relevance ``r`` is the cosine of a visual token and the question
    (:class:`~st3.methods.scores.Relevance`), min-max normalised over the row.

    Source: CDPruner (arXiv 2506.10967), eq. 7 to 9, and its code. Departure: the question is the
    mean of its tokens' embeddings in the decoder (as in OpenVINO GenAI's version), because only
    CLIP has a text encoder beside its vision tower; the sign of CLIP's similarity, which the code
    turns round, stays.
    """

    name: str = "cdpruner"
    stage: Stage = "embeds"

    def __call__(self, view: TokenView) -> Tensor:
        alike = similarity(view).masked_fill(strangers(view), 0.0)
        relevance = _from_0_to_1(Relevance()(view), view.visual)
        kernel = relevance[:, :, None] * alike * relevance[:, None]
        gain = kernel.diagonal(dim1=1, dim2=2).clone()
        order = Picks(view)
        least = EXHAUSTED * gain.masked_fill(~view.visual, 0.0).amax(1, keepdim=True)
        bases = kernel.new_zeros(order.turns, *gain.shape)
        for turn in range(order.turns):
            # What is explained already ranks by relevance, behind everything else.
            token = order.take(torch.where(gain > least, gain + 2, relevance))
            known = bases[:turn]
            explained = (known[:, order.row, token][..., None] * known).sum(0)
            scale = gain[order.row, token].clamp_min(torch.finfo(gain.dtype).tiny).sqrt()
            basis = (kernel[order.row, token] - explained) / scale[:, None]
            basis = basis * (gain[order.row, token] > least[:, 0])[:, None]
            bases[turn] = basis
            gain = gain - basis * basis
        return order.scores(relevance)


def _from_0_to_1(cosine: Tensor, among: Tensor) -> Tensor:
    """``cosine`` [B, N], from a little above 0 to 1 over the columns ``among``; 0 elsewhere."""
    low = cosine.masked_fill(~among, float("inf")).amin(1, keepdim=True)
    high = cosine.masked_fill(~among, float("-inf")).amax(1, keepdim=True)
    return ((cosine - low + 1e-6) / (high - low).clamp_min(1e-6)).masked_fill(~among, 0.0)
