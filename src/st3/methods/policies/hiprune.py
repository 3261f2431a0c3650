"""HiPrune: what the middle and the end of the vision tower attend to, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.schedule import check_share
from st3.methods.scores.base import Score
from st3.methods.scores.hiprune import Hierarchy


@register
@dataclass(frozen=True)
class HiPrune(BeforeDecoder):
    """HiPrune: before the decoder, keep what the middle of the tower attends to with what lies
    beside it, and what its end attends to.

    Args:
        keep: share kept.
        alpha: share of these that come from the middle, neighbours included.
        depth: the middle layer, as a share of the tower's layers; the authors take the 9th of 24
            in CLIP-L and the 16th of 32 in Qwen2.5-VL.

    Source: arXiv 2508.00553 (ACL 2026); departures: see :class:`st3.methods.scores.Hierarchy`.
    """

    alpha: float = 0.1
    depth: float = 0.375

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "arXiv 2508.00553 (ACL 2026)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha)
        check_share("depth", self.depth)

    def scorer(self) -> Score:
        return Hierarchy(self.alpha, self.depth, self.keep)
