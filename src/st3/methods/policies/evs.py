"""EVS: what is new in a frame, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.frame_change import FrameChange


@register
@dataclass(frozen=True)
class EVS(BeforeDecoder):
    """EVS: before the decoder, keep the first frame and what differs most from the frame before.

    Args:
        keep: share kept.

    Source: efficient video sampling, as vLLM has it (``--video-pruning-rate`` is 1 - ``keep``);
    departures: see :class:`st3.methods.scores.FrameChange`.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "EVS, as in vLLM"

    def scorer(self) -> Score:
        return FrameChange()
