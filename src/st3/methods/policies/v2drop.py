"""V2Drop: what a layer hardly changes leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import Staged
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.hidden_change import HiddenChange


@register
@dataclass(frozen=True)
class V2Drop(Staged):
    """V2Drop: three drops of the tokens whose hidden state changed least in the layer before.

    Args:
        layers: first decoder layers (0-based) with fewer tokens; the code's are 3, 17, 22 of 32.
        keep: shares left there.

    Source: arXiv 2509.01552 (CVPR 2026). Departure: at the last drop nothing is left, where the
    code leaves one token.
    """

    keep: tuple[float, ...] = (0.5, 0.25, 0.0)

    name: ClassVar[str] = "v2drop"
    paper: ClassVar[str] = "arXiv 2509.01552 (CVPR 2026)"
    paper_layers: ClassVar[tuple[int, ...]] = (3, 17, 22)

    def scorer(self) -> Score:
        return HiddenChange()
