"""How much a layer changes a token: V2Drop's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.registry import register
from st3.methods.scores.uniform import even_spread


@register
@dataclass(frozen=True)
class HiddenChange:
    """L2 distance of a token's hidden state from what it was one layer before.

    Source: V2Drop (arXiv 2509.01552). At the input of layer 0 nothing has changed yet: there, where
    annealing may ask, tokens rank by an even spread.
    """

    name: str = "hidden-change"
    stage: Stage = "input"

    def __call__(self, view: TokenView) -> Tensor:
        if view.before is None or view.hidden is None:
            return even_spread(view.ordinal)
        return torch.linalg.vector_norm(view.hidden.float() - view.before.float(), dim=-1)
