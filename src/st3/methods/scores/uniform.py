"""An even spread over the image, whatever the model looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.registry import register

_GOLDEN = 2654435769  # the golden ratio's fractional part, of 2 ** 32


@register
@dataclass(frozen=True)
class Uniform:
    """Spread the kept tokens evenly over their order in the prompt, at any budget.

    Each token gets the fractional part of ``ordinal * golden ratio``, a sequence whose every
    threshold is close to evenly spaced: the best k of n tokens lie about n / k apart, and what a
    deeper layer keeps is a subset of what the layer before kept.

    Source: uniform and pooled tokens as baselines, arXiv 2502.11501.
    """

    name: str = "uniform"
    stage: Stage = "embeds"

    def __call__(self, view: TokenView) -> Tensor:
        return even_spread(view.ordinal)


def even_spread(ordinal: Tensor) -> Tensor:
    """A number in [0, 1) per token, of its place alone: any threshold picks an even spread."""
    # In whole numbers, as Apple GPUs have no float64; 24 bits are what float32 holds exactly.
    return ((ordinal * _GOLDEN & 0xFFFFFFFF) >> 8).float() / (1 << 24)
