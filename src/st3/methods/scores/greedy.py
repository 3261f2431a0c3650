"""Scores of the embeddings that pick one token after the other: DivPrune and CDPruner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView

EXHAUSTED = (
    1e-6  # a token that the picked ones explain up to this share of the largest is explained
)


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
        distance = 1 - _similarity(view)
        distance = distance.masked_fill(_strangers(view), float("inf"))
        itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
        nearest = distance.masked_fill(itself, float("inf")).amin(dim=2)  # to any other token
        order = _Picks(view)
        to_picked = torch.full_like(nearest, float("inf"))
        for _ in range(order.turns):
            # Distances end at 2: images of which nothing is picked yet start first.
            token = order.take(torch.where(to_picked.isinf(), 2 + nearest, to_picked))
            to_picked = torch.minimum(to_picked, distance[order.row, token])
        return order.scores(nearest)


@dataclass(frozen=True)
class ConditionalDPP:
    """Relevant and unlike each other: greedy maximum of a determinantal point process on the
    kernel ``r_i * cosine(i, j) * r_j``.

    The relevance ``r`` is the cosine of a visual token and the question, min-max normalised over
    the row.

    Source: CDPruner (arXiv 2506.10967), eq. 7 to 9, and its code. Departure: the question is the
    mean of its tokens' embeddings in the decoder (as in OpenVINO GenAI's version), because only
    CLIP has a text encoder beside its vision tower; the sign of CLIP's similarity, which the code
    turns round, stays.
    """

    name: str = "cdpruner"
    stage: Stage = "embeds"

    def __call__(self, view: TokenView) -> Tensor:
        similarity = _similarity(view).masked_fill(_strangers(view), 0.0)
        relevance = _relevance(view)
        kernel = relevance[:, :, None] * similarity * relevance[:, None]
        gain = kernel.diagonal(dim1=1, dim2=2).clone()
        order = _Picks(view)
        least = EXHAUSTED * gain.masked_fill(~view.visual, 0.0).amax(1, keepdim=True)
        bases = kernel.new_zeros(order.turns, *gain.shape)
        for turn in range(order.turns):
            # What is explained already ranks by relevance, behind everything else.
            token = order.take(torch.where(gain > least, gain + 2, relevance))
            known = bases[:turn]
            explained = (known[:, order.row, token][..., None] * known).sum(0)
            scale = gain[order.row, token].clamp_min(torch.finfo(gain.dtype).tiny).sqrt()
            basis = (kernel[order.row, token] - explained) / scale[:, None]
            basis = basis * (gain[order.row, token] > least[:, 0])[:, None]
            bases[turn] = basis
            gain = gain - basis * basis
        return order.scores(relevance)


class _Picks:
    """Tokens picked one by one, in all rows at once."""

    def __init__(self, view: TokenView) -> None:
        visual = view.visual
        most = max((sum(row) for row in view.images), default=visual.shape[1])
        self.turns = most if view.wanted is None else min(view.wanted, most)
        self.row = torch.arange(visual.shape[0], device=visual.device)
        self.visual = visual
        self.free = visual.clone()
        self.turn_of = torch.full(visual.shape, self.turns, device=visual.device)
        self.turn = 0

    def take(self, gain: Tensor) -> Tensor:
        """The free visual token [B] with the largest ``gain`` [B, N]; the earlier of equals. Rows
        that have none left give any column, which changes nothing."""
        token = gain.masked_fill(~self.free, float("-inf")).argmax(dim=1)
        before = self.turn_of[self.row, token]
        self.turn_of[self.row, token] = before.clamp_max(self.turn)
        self.free[self.row, token] = False
        self.turn += 1
        return token

    def scores(self, rest: Tensor) -> Tensor:
        """Scores that give this order; tokens never picked follow by ``rest`` [B, N]."""
        squashed = torch.sigmoid(rest.nan_to_num().double()) / 2
        return torch.where(
            self.turn_of < self.turns, -self.turn_of.double(), squashed - self.turns - 1
        )


def _similarity(view: TokenView) -> Tensor:
    """Cosine of all pairs of columns, [B, N, N]."""
    assert view.hidden is not None  # layer 0 always has embeddings
    unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
    return torch.matmul(unit, unit.transpose(1, 2))


def _relevance(view: TokenView) -> Tensor:
    """Cosine of each column and the mean of the question's, [B, N], from 0 to 1 over the row's
    visual tokens."""
    assert view.hidden is not None
    unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
    question = view.question.to(unit.dtype)
    mean = (unit * question[..., None]).sum(1) / question.sum(1, keepdim=True).clamp_min(1)
    cosine = (unit * mean[:, None]).sum(-1)
    low = cosine.masked_fill(~view.visual, float("inf")).amin(1, keepdim=True)
    high = cosine.masked_fill(~view.visual, float("-inf")).amax(1, keepdim=True)
    spread = (high - low).clamp_min(1e-6)
    return ((cosine - low + 1e-6) / spread).masked_fill(~view.visual, 0.0)


def _strangers(view: TokenView) -> Tensor:
    """Pairs of columns that are not both visual, or draw on different budgets, [B, N, N]."""
    pair = view.visual[:, :, None] & view.visual[:, None]
    if view.group is not None:
        pair = pair & (view.group[:, :, None] == view.group[:, None])
    return ~pair
