"""DivPrune: the tokens that lie farthest apart, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.divprune import MaxMin


@register
@dataclass(frozen=True)
class DivPrune(BeforeDecoder):
    """DivPrune: before the decoder, keep the tokens whose smallest distance is greatest.

    Args:
        keep: share kept; papers report 192, 128 and 64 of 576 tokens (0.333, 0.222, 0.111).

    Source: arXiv 2503.02175 (CVPR 2025). Departure: positions are kept, where the code numbers what
    is left anew.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "arXiv 2503.02175 (CVPR 2025)"

    def scorer(self) -> Score:
        return MaxMin()
