"""An even grid, chosen before the decoder: a strong baseline without any score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.grid import Grid


@register
@dataclass(frozen=True)
class UniformGrid(BeforeDecoder):
    """Uniform grid: before the decoder, keep evenly spaced tokens of each image.

    Args:
        keep: share kept.

    Source: uniform sampling as a baseline, arXiv 2502.11501 and 2412.13180; see
    :class:`st3.methods.scores.Grid`.
    """

    name: ClassVar[str] = "grid"
    paper: ClassVar[str] = "baseline, see arXiv 2502.11501"

    def scorer(self) -> Score:
        return Grid()
