"""VisionZip: what the vision tower's class token looks at, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.schedule import check_share
from st3.methods.scores.base import Score
from st3.methods.scores.class_attention import ClassAttention


@register
@dataclass(frozen=True)
class VisionZip(BeforeDecoder):
    """VisionZip: before the decoder, keep what the vision tower's class token attends to.

    Args:
        keep: share kept; papers report 192, 128 and 64 of 576 tokens (0.333, 0.222, 0.111).
        dominant: share of these that the class token chooses; the others are every n-th one.

    Source: arXiv 2412.04467 (CVPR 2025); departures: see
    :class:`st3.methods.scores.ClassAttention`.
    """

    dominant: float = 0.84375

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "arXiv 2412.04467 (CVPR 2025)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("dominant", self.dominant)

    def scorer(self) -> Score:
        return ClassAttention(self.dominant, self.keep)
