"""An even grid, and in between what the vision tower attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Score, Stage, TokenView, ranks
from st3.methods.scores.grid import Grid
from st3.methods.scores.looks import Look
from st3.methods.scores.mixed import Mixed
from st3.methods.scores.picks import interleaved
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class Salient:
    """A token counts by the better of two places: in an even grid, and by the attention that it
    receives in the vision tower. What is dropped within the decoder goes by the grid and the last
    token's attention.

    It needs no question, so that what is kept before the decoder serves any question.

    Args:
        share: of any number of tokens about this share is there by the tower, the rest by the grid.
        later: the score of the drops within the decoder.

    Source: this project's; a grid beside attention is FEATHER's idea (arXiv 2412.13180).
    """

    share: float = 0.5
    later: Score = field(default_factory=Mixed)
    name: str = "salient"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("tower", "grids")

    def __post_init__(self) -> None:
        check_share("share", self.share)

    @property
    def looks(self) -> tuple[Look, ...]:
        return (Look("received"),)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.tower is not None  # the engine gives it or refuses
        by_tower, by_grid = ranks(view.tower, view.visual), ranks(Grid()(view), view.visual)
        return interleaved(by_tower.float(), self.share, by_grid.float())
