"""Attention of the text tokens that the image speaks to: SparseVLM's raters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.attention import Attention
from st3.methods.scores.base import LayerView, TokenView
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class TextRaters:
    """Mean attention, over heads and raters, of the text tokens with above-mean visual relevance.

    The relevance of a text token behind the image is its mean share in the softmax, over those
    text tokens, of the products of visual and text embeddings; the raters are chosen once.

    Source: SparseVLM (arXiv 2410.04417), eq. 3 and 4, and its code. A row without a token above the
    mean is rated by all of its text behind the image.
    """

    name: str = "text-raters"

    def prepare(self, view: TokenView) -> Tensor:
        """The raters, [B, N] of 0 and 1."""
        assert view.hidden is not None  # layer 0 always has embeddings
        question = view.question
        hidden = view.hidden.float()
        products = torch.matmul(hidden, hidden.transpose(1, 2))  # visual rows, text columns
        lowest = torch.finfo(products.dtype).min
        share = products.masked_fill(~question[:, None], lowest).softmax(dim=-1)
        share = (share * view.visual[..., None]).sum(1) / view.visual.sum(1).clamp_min(1)[:, None]
        mean = (share * question).sum(1) / question.sum(1).clamp_min(1)
        raters = question & (share > mean[:, None])
        return torch.where(raters.any(1, keepdim=True), raters, question).to(hidden.dtype)

    def __call__(self, view: LayerView) -> Tensor:
        assert view.prepared is not None  # the engine calls prepare() first
        return Attention().over(view, view.prepared > 0)
