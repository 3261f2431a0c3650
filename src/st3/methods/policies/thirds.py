"""Thirds: a grid and what stands out before the decoder; at each third of the depth two thirds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from st3.methods.policies.base import Policy, check_count
from st3.methods.policies.layouts import solve, with_keep
from st3.methods.policies.registry import register
from st3.methods.schedule import NO_ANNEAL, Anneal, Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.standout import Standout


@register
@dataclass(frozen=True)
class Thirds(Policy):
    """Thirds: before the decoder, keep an even grid and what stands out in each window of the image
    to the vision tower; at a third and at two thirds of the depth, keep two thirds of that, one in
    four of them for the attention that the prompt's last token gives them.

    What each part is for: the grid for what is counted and described, the tower for what is small,
    windows so that a large object does not take what a small one needs, the prompt's attention for
    what is asked. Early layers get more than late ones, because they read the image for all later
    ones. Where the tower's attention cannot be followed to the tokens, those stand out that few
    others are like (see :class:`st3.methods.scores.Standout`).

    Args:
        keep: share kept before the decoder.
        later: share of these that each of the two drops within the decoder leaves; 1 drops nothing
            there.
        salient: share of the tokens kept before the decoder that are there because they stand out,
            the others by the grid.
        window: side of a window, in tokens.
        every: of the drops within the decoder, one place in so many is the attention's, at least 2.
        tower: False takes what few others are like, also where the vision tower says more.
        anneal: how decode steps hide what is left; nothing is hidden by default.

    Source: this project's, of parts that others have: attention in the tower VisionZip's (arXiv
    2412.04467), windows and a drop half way VScan's (arXiv 2505.22654), fewer with depth
    PyramidDrop's (arXiv 2410.17247) and ST3's (arXiv 2412.20105), a grid beside attention FEATHER's
    (arXiv 2412.13180). Its own are the mix, the layers and the counts.
    """

    keep: float = 0.5
    later: float = 0.667
    salient: float = 0.667
    window: int = 4
    every: int = 4
    tower: bool = True
    anneal: Anneal = NO_ANNEAL

    name: ClassVar[str] = "thirds"
    paper: ClassVar[str] = "this project"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_share("later", self.later)
        check_share("salient", self.salient)
        if not isinstance(self.tower, bool):
            raise ValueError(f"tower must be true or false, got {self.tower!r}")
        check_count("window", self.window)
        check_count("every", self.every, least=2)

    def schedule(self, num_layers: int) -> Schedule:
        keep, later = exact(self.keep), exact(self.later)
        drops = num_layers // 3, 2 * num_layers // 3
        shares = (keep * later ** sum(at <= layer for at in drops) for layer in range(num_layers))
        return Schedule(tuple(shares), self.anneal)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        """This policy with another ``keep``; above what ``later`` allows, with all tokens before
        the decoder and a larger ``later``.

        Raises:
            ValueError: no share within [0, 1].
        """
        check_share("mean_keep", mean_keep)
        whole = dataclasses.replace(self, keep=1.0)
        if mean_keep <= whole.schedule(num_layers).mean_share:
            return with_keep(self, num_layers, mean_keep, bound="later")

        def mean_share(later: float) -> float:
            larger = dataclasses.replace(whole, later=round(later, 12))
            return larger.schedule(num_layers).mean_share

        return dataclasses.replace(whole, later=round(solve(mean_share, mean_keep, 1.0), 12))

    def scorer(self) -> Score:
        return Standout(self.salient, self.window, self.every, self.tower)
