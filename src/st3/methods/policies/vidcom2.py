"""VidCom2: more for the frames that differ, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.frame_quota import FrameQuota


@register
@dataclass(frozen=True)
class VidCom2(BeforeDecoder):
    """VidCom2: before the decoder, keep the least redundant tokens, more of unusual frames.

    Args:
        keep: share kept.

    Source: arXiv 2505.14454 (EMNLP 2025), as vLLM has it; departures: see
    :class:`st3.methods.scores.FrameQuota`.
    """

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "arXiv 2505.14454 (EMNLP 2025)"

    def scorer(self) -> Score:
        return FrameQuota(self.keep)
