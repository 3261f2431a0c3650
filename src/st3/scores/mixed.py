"""Two rankings taken in turn: what is attended, and what covers the image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from st3.scores.attention import Attention
from st3.scores.base import LayerView, Score, Stage, TokenView, ranks
from st3.scores.grid import Grid


@dataclass(frozen=True)
class Mixed:
    """The best token of the attention, the best of an even grid, the second best of the attention
    and so on, each token once.

    Attention alone keeps many tokens of what the prompt's last token looks at and none of the
    rest, which counting and long descriptions come back to. At any budget about half of the tokens
    kept are those of the grid.

    Source: the idea of attention plus a grid is FEATHER's (arXiv 2412.13180), which takes the grid
    at the first drop alone and attention without RoPE.
    """

    attention: Score = field(default_factory=Attention)
    cover: Score = field(default_factory=Grid)
    name: str = "mixed"
    stage: Stage = "attention"

    @property
    def last_row(self) -> bool:
        """Whether of a layer's attention it reads the last row alone."""
        return getattr(self.attention, "last_row", False)

    def prepare(self, view: TokenView) -> Tensor:
        """The cover's score, which does not change from layer to layer, [B, N]."""
        return self.cover(view)

    def __call__(self, view: LayerView) -> Tensor:
        cover = self.cover(view) if view.prepared is None else view.prepared
        # Before it is ranked: a mean of ranks is not the rank of a mean.
        attention = view.over_ranks(self.attention(view))
        attended, covering = (ranks(score, view.visual) for score in (attention, cover))
        return -torch.minimum(2 * attended, 2 * covering + 1).float()
