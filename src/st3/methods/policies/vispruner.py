"""VisPruner: what the vision tower attends to, and what has no duplicate, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.schedule import check_share
from st3.methods.scores.base import Score
from st3.methods.scores.vispruner import Distinct


@register
@dataclass(frozen=True)
class VisPruner(BeforeDecoder):
    """VisPruner: before the decoder, keep what the tower attends to, and of the rest what differs.

    Args:
        keep: share kept.
        important: share of these that attention chooses.

    Source: arXiv 2412.01818 (ICCV 2025); departures: see :class:`st3.methods.scores.Distinct`.
    """

    important: float = 0.5

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "arXiv 2412.01818 (ICCV 2025)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("important", self.important)

    def scorer(self) -> Score:
        return Distinct(self.important, self.keep)
