"""Tokens that lie far from each other: DivPrune's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.picks import Picks, similarity, strangers
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class MaxMin:
    """Farthest point first: each token picked is the one farthest, in cosine distance, from those
    picked before. The first is the one whose nearest neighbour is farthest.

    Source: DivPrune (arXiv 2503.02175), algorithm 1. With a budget per image, each image is
    covered by itself.
    """

    name: str = "divprune"
    stage: Stage = "embeds"

    def __call__(self, view: TokenView) -> Tensor:
        distance = 1 - similarity(view)
        distance = distance.masked_fill(strangers(view), float("inf"))
        itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
        nearest = distance.masked_fill(itself, float("inf")).amin(dim=2)  # to any other token
        order = Picks(view)
        to_picked = torch.full_like(nearest, float("inf"))
        for _ in range(order.turns):
            # Distances end at 2: images of which nothing is picked yet start first.
            token = order.take(torch.where(to_picked.isinf(), 2 + nearest, to_picked))
            to_picked = torch.minimum(to_picked, distance[order.row, token])
        return order.scores(nearest)
