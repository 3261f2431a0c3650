"""PixelPrune: tokens whose pixels their neighbours predict, dropped before the decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Self

from st3.methods.policies.base import Policy
from st3.methods.policies.registry import register
from st3.methods.schedule import Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.novelty import Novelty


@register
@dataclass(frozen=True)
class PixelPrune(Policy):
    """PixelPrune: before the decoder, drop the tokens whose pixels are those of a neighbour. How
    many stay depends on the image.

    Args:
        threshold: the largest difference between two pixels that counts as none, in the units of
            the model's pixel input; 0, the code's default, drops exact repetitions alone.
        keep: share kept, those first whose pixels differ most from what is predicted; None keeps
            all that differ, however many they are.

    Source: arXiv 2604.00886 and its code. Departures: it drops before the vision tower, here the
    tower sees the whole image; ``keep`` is this project's, for tables at equal budgets.
    """

    threshold: float = 0.0
    keep: float | None = None

    name: ClassVar[str] = "pixelprune"
    paper: ClassVar[str] = "arXiv 2604.00886"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_share("keep", self.keep)
        self.scorer()

    def scorer(self) -> Score:
        return Novelty(self.threshold, self.threshold if self.keep is None else None)

    def schedule(self, num_layers: int) -> Schedule:
        if self.keep is not None:
            return Schedule((exact(self.keep),) * num_layers)
        return Schedule((Fraction(1),) * num_layers, counted=True)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        check_share("mean_keep", mean_keep)
        return replace(self, keep=mean_keep)
