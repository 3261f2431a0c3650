"""How much the layers turn a token, and how much the question looks at it: TransPrune's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.attention import Attention
from st3.methods.scores.base import LayerView, Stage, TokenView
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class Transition:
    """Token transition variation plus instruction-guided attention, each as a share of its sum over
    the visual tokens.

    The variation of a token is that of the attention and of the MLP of each layer, from the one
    before the first drop on: by how much it grows what it is given, times the softmax over the
    visual tokens of 1 - the cosine of the two. The attention is that of the text behind the image,
    mean over heads and tokens.

    Source: TransPrune (arXiv 2507.20630) and its code. Departures: the attention is that of the
    layer before a drop, where the code takes the layer behind it; the softmax is over a row's
    visual tokens, where the code takes it over all of a batch.
    """

    name: str = "transprune"
    stage: Stage = "input"

    def note(self, view: LayerView) -> Tensor:
        """The question's attention, [B, N]."""
        return Attention().over(view, view.question)

    def turn(self, given: Tensor, made: Tensor, visual: Tensor) -> Tensor:
        """How much an attention or an MLP turns each token, [B, N]."""
        given, made = given.float(), made.float()
        grown = made.norm(dim=-1) / given.norm(dim=-1).clamp_min(1e-6)
        turned = 1 - torch.nn.functional.cosine_similarity(given, made, dim=-1)
        lowest = torch.finfo(turned.dtype).min
        share = turned.masked_fill(~visual, lowest).softmax(-1)
        return (grown * share).masked_fill(~visual, 0.0)

    def __call__(self, view: TokenView) -> Tensor:
        score = torch.zeros(view.visual.shape, device=view.visual.device)
        for part in (view.turned, view.noted):
            if part is not None:
                own = part.float().masked_fill(~view.visual, 0.0)
                score = score + own / own.sum(1, keepdim=True).clamp_min(1e-12)
        return score
