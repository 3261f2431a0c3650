"""Covered: a grid and what the vision tower attends to before the decoder, fewer with depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from st3.methods.policies.base import Policy
from st3.methods.policies.layouts import with_keep
from st3.methods.policies.registry import register
from st3.methods.schedule import Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.salient import Salient

QUARTERS = 4


@register
@dataclass(frozen=True)
class Covered(Policy):
    """Covered: before the decoder, keep an even grid and what the vision tower attends to; at each
    quarter of the depth fewer, by the grid and the last token's attention.

    Args:
        keep: share kept before the decoder.
        taper: what is left of it behind the last drop; 1 drops nothing within the decoder.
        tower: share of these that the tower's attention chooses, the rest by the grid.

    Source: this project's, of parts that others have: the drop before the decoder is VisionZip's
    (arXiv 2412.04467), the fewer with depth PyramidDrop's (arXiv 2410.17247) and ST3's
    (arXiv 2412.20105), a grid beside attention FEATHER's (arXiv 2412.13180).
    """

    keep: float = 0.4375
    taper: float = 0.6
    tower: float = 0.333

    name: ClassVar[str] = "covered"
    paper: ClassVar[str] = "this project"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_share("taper", self.taper)
        check_share("tower", self.tower)

    def schedule(self, num_layers: int) -> Schedule:
        keep, down = exact(self.keep), (1 - exact(self.taper)) / (QUARTERS - 1)
        steps = (QUARTERS * layer // num_layers for layer in range(num_layers))
        return Schedule(tuple(keep * (1 - down * step) for step in steps))

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        return with_keep(self, num_layers, mean_keep, bound="taper")

    def scorer(self) -> Score:
        return Salient(self.tower)
