"""TransPrune: what the layers turn most and the question looks at, in three drops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import Staged
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.transprune import Transition


@register
@dataclass(frozen=True)
class TransPrune(Staged):
    """TransPrune: three drops; keep the tokens that attention and MLPs turn most and that the
    question looks at.

    Args:
        layers: first decoder layers (0-based) with fewer tokens; the authors' are
            7, 9 and 12 of 32.
        keep: shares left there.

    Source: arXiv 2507.20630 (CVPR 2026); departures: see :class:`st3.methods.scores.Transition`.
    """

    keep: tuple[float, ...] = (0.875, 0.625, 0.125)

    name: ClassVar[str] = "transprune"
    paper: ClassVar[str] = "arXiv 2507.20630 (CVPR 2026)"
    paper_layers: ClassVar[tuple[int, ...]] = (7, 9, 12)

    def scorer(self) -> Score:
        return Transition()
