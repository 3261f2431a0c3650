"""Attention without RoPE, and at first a grid besides: FEATHER's score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from st3.methods.scores.attention import Attention
from st3.methods.scores.base import LayerView
from st3.methods.scores.grid import on_stride
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class Feather:
    """The last token's attention without RoPE; as long as no token has been dropped, the tokens of
    every ``stride``-th row and column come first.

    Source: FEATHER (arXiv 2412.13180) and its code. Departure: an image whose tokens are no grid
    has every ``stride * stride``-th token of its order in place of a grid.
    """

    stride: int = 3
    name: str = "feather"
    needs: tuple[str, ...] = ("rotary", "grids")

    def __call__(self, view: LayerView) -> Tensor:
        attention = Attention(rotary=False)(view)
        if not view.complete:
            return attention
        return attention + on_stride(view, self.stride)  # attention is below 1
