"""Little duplication of a few pivot tokens: DART's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Stage, TokenView, ranks, share_of
from st3.methods.scores.registry import register
from st3.methods.scores.uniform import even_spread


@register
@dataclass(frozen=True)
class Dart:
    """Keep the pivots, and for each pivot the visual tokens least similar to it.

    Pivots are the visual tokens, and the text tokens behind the image, whose keys have the largest
    L1 norm. Similarity is the cosine of hidden states. Where it is known how many tokens stay, one
    pivot after the other takes its equal part of them, of those that are still free. Where it is
    not (``keep`` is None), a token counts by its best place in the pivots' rankings.

    Args:
        image_pivots, text_pivots: how many of each; with a budget per image, of each image.
        keep: share of the visual tokens that the next drop leaves, the only one so far.

    Source: DART (arXiv 2502.11494) and its code. Departures: the pivots come in the order of their
    keys, those of the image first, where the code goes by a Python set; similarity is taken before
    the decoder's final norm, not after it; at the input of layer 0, where there are no keys yet and
    annealing may ask, tokens rank by an even spread.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    keep: float | None = None
    name: str = "dart"
    stage: Stage = "input"
    needs: tuple[str, ...] = ("keys",)

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_share("keep", self.keep)

    def __call__(self, view: TokenView) -> Tensor:
        if view.keys is None or view.hidden is None:
            return even_spread(view.ordinal)
        size = view.keys.float().abs().sum(dim=(1, 3))  # L1 norm over all heads, [B, N]
        unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
        asked = _largest(size, view.question, self.text_pivots)
        score = torch.zeros_like(size)
        for tokens, count in view.budgets():
            own = _largest(size, tokens, self.image_pivots)
            pivot, exists = (torch.cat(of, dim=1) for of in zip(own, asked, strict=True))
            chosen = unit.gather(1, pivot[..., None].expand(-1, -1, unit.shape[-1]))
            similarity = torch.matmul(chosen, unit.transpose(1, 2))  # [B, pivots, N]
            is_pivot = torch.zeros_like(size).scatter_add_(1, own[0], own[1].to(size.dtype)) > 0
            others = tokens & ~is_pivot
            if self.keep is None:
                order = _by_best_place(similarity, exists, others)
            else:
                left = share_of(self.keep, count) - own[1].sum(1, keepdim=True)
                order = _one_after_the_other(similarity, exists, others, left.clamp_min(0))
            score = torch.where(tokens, torch.where(is_pivot, size, -1.0 - order), score)
        return score


def _largest(size: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` columns of ``among`` with the largest ``size``, [B, count], and which of them
    there are: a row may have fewer."""
    found = size.masked_fill(~among, -1.0).topk(min(count, size.shape[1]), dim=1)
    return found.indices, found.values >= 0


def _by_best_place(similarity: Tensor, exists: Tensor, others: Tensor) -> Tensor:
    """Places of the tokens by their best place in any pivot's ranking, [B, N]; of tokens at the
    same place, the less similar one comes first."""
    places = torch.stack([ranks(-row, others) for row in similarity.unbind(1)], dim=1)
    places = places.masked_fill(~exists[..., None], places.shape[-1])
    best = places.amin(1)
    least = similarity.masked_fill(places > best[:, None], float("inf")).amin(1)
    return ranks(-(best * places.shape[-1] + ranks(-least, others)), others)


def _one_after_the_other(
    similarity: Tensor, exists: Tensor, others: Tensor, left: Tensor
) -> Tensor:
    """Places of the tokens, [B, N], when each pivot in its turn takes its part of ``left`` [B, 1]
    from what is free; those that nobody takes come last."""
    pivots = exists.sum(1, keepdim=True).clamp_min(1)
    number = exists.cumsum(1) - 1
    part = torch.where(exists, left // pivots + (number < left % pivots), 0)
    place = torch.full_like(others, similarity.shape[-1], dtype=torch.long)
    taken = torch.zeros_like(left)
    free = others
    for pivot, row in enumerate(similarity.unbind(1)):
        own = ranks(-row, free)
        takes = free & (own < part[:, pivot : pivot + 1])
        place = torch.where(takes, taken + own, place)
        taken = taken + part[:, pivot : pivot + 1]
        free = free & ~takes
    return place
