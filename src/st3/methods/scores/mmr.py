"""Importance and diversity: tokens of a high score that are unlike those picked before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from st3.methods.scores.attention import Attention
from st3.methods.scores.base import Score, Stage, TokenView, needs_of, stage_of
from st3.methods.scores.picks import Picks, similarity, strangers
from st3.methods.scores.registry import register, score_named


@register
@dataclass(frozen=True)
class MarginalRelevance:
    """Maximal marginal relevance: each token picked has the largest

        balance * importance - (1 - balance) * largest cosine with one picked before,

    the importance being any other score, from 0 to 1 over the tokens that share a budget, and the
    cosine that of the hidden states where that score is taken (of the embeddings, if before the
    decoder).

    Args:
        of: the score that says the importance.
        balance: its weight, between 0 (diversity alone) and 1.

    Source: the selection of IDPruner, algorithm 1, and its code (Tencent/AngelSlim); there the
    importance comes from a trained scorer.
    """

    forms: ClassVar[str] = "mmr- before any other score"

    of: Score = field(default_factory=Attention)
    balance: float = 0.5

    @classmethod
    def named(cls, name: str) -> MarginalRelevance | None:
        """The score that a name such as "mmr-cdpruner" says; None for other names."""
        rest = name.removeprefix("mmr-")
        return cls(score_named(rest)) if rest != name else None

    @property
    def name(self) -> str:
        return f"mmr-{self.of.name}"

    @property
    def stage(self) -> Stage:
        return stage_of(self.of)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.of)

    @property
    def prepare(self) -> Callable[[TokenView], Tensor] | None:
        prepare: Callable[[TokenView], Tensor] | None = getattr(self.of, "prepare", None)
        return prepare

    def __call__(self, view: Any) -> Tensor:
        importance = self.of(view).float()
        if stage_of(self.of) == "attention":
            importance = view.over_ranks(importance)  # what is picked must not differ between them
        worth = torch.zeros_like(importance)
        for tokens, _ in view.budgets():
            worth = torch.where(tokens, from_0_to_1(importance, tokens), worth)
        alike = similarity(view).masked_fill_(strangers(view), -1.0)
        order = Picks(view)
        closest = torch.full_like(worth, -1.0)
        for _ in range(order.turns):
            token = order.take(self.balance * worth - (1 - self.balance) * closest)
            closest = torch.maximum(closest, alike[order.row, token])
        return order.scores(worth)


def from_0_to_1(score: Tensor, among: Tensor) -> Tensor:
    """``score`` [B, N], moved and scaled so that it goes from 0 to 1 over the columns ``among``."""
    low = score.masked_fill(~among, float("inf")).amin(1, keepdim=True)
    high = score.masked_fill(~among, float("-inf")).amax(1, keepdim=True)
    return (score - low) / (high - low).clamp_min(1e-6)
