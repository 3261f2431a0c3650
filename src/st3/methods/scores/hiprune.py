"""Tokens that the middle of the vision tower looks at, their neighbours, and what its end looks at:
HiPrune's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Stage, TokenView, ranks, share_of
from st3.methods.scores.looks import Look
from st3.methods.scores.neighbours import beside
from st3.methods.scores.picks import interleaved
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class Hierarchy:
    """Anchors, the tokens that receive most attention in a middle layer of the vision tower; the
    tokens beside them; and to fill the budget, registers, those that receive most in the layer
    behind the features.

    Where it is not known how many tokens stay (``keep`` is None), a token counts by the better of
    two places: among the anchors, and among the registers, in the proportion ``alpha``.

    Args:
        alpha: share of the kept tokens that anchors and their four neighbours are to be.
        depth: the middle layer, as a share of the tower's layers.
        keep: share of the visual tokens that the drop leaves.

    Source: HiPrune (arXiv 2508.00553) and its code: the 9th of CLIP-L's 24 layers, the 16th of
    Qwen2.5-VL's 32, alpha 0.1. Departure: "round" is half up, as everywhere here.
    """

    alpha: float = 0.1
    depth: float = 0.375
    keep: float | None = None
    name: str = "hiprune"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("tower", "grids")

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        check_share("depth", self.depth)
        if self.keep is not None:
            check_share("keep", self.keep)

    @property
    def looks(self) -> tuple[Look, ...]:
        return Look("received", self.depth), Look("received")

    def __call__(self, view: TokenView) -> Tensor:
        assert view.towers is not None  # the engine gives it or refuses
        middle, end = view.towers
        if self.keep is None:
            places = [ranks(weights, view.visual).float() for weights in (middle, end)]
            return interleaved(places[0], self.alpha, places[1])
        near = beside(view)
        score = torch.zeros_like(end)
        for tokens, count in view.budgets():
            anchors = share_of(self.alpha / 5, share_of(self.keep, count))
            anchor = tokens & (ranks(middle, tokens) < anchors)
            buffer = tokens & (near & anchor[:, None]).any(2)
            order = ranks(end, tokens & ~anchor & ~buffer) + tokens.sum(1, keepdim=True)
            order = torch.where(buffer, ranks(end, buffer), order)
            order = torch.where(anchor, ranks(middle, tokens) - tokens.sum(1, keepdim=True), order)
            score = torch.where(tokens, -order.float(), score)
        return score
