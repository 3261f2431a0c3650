"""Groups by principal components, and in each of them tokens that are unlike: PruneSID's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Stage, TokenView, ranks, share_of
from st3.methods.scores.picks import similarity
from st3.methods.scores.registry import register

LEAST_GROUPS = 4
PER_GROUP = 5  # tokens of a group at most, for each 64 that stay


@register
@dataclass(frozen=True)
class Principal:
    """One group of tokens for each of the first principal components, a quarter as many as tokens
    stay; each group's tokens by their weight in its component, those first that are not too much
    like one before them; and of each group as many as it has of those, in proportion.

    The components are of the sigmoid of the embeddings, the tokens being the variables; a token
    belongs where its weight is largest. It is too much like an earlier one of its group from a
    cosine on that rises with the number of tokens that stay: their mean over all pairs, times the
    tokens that stay for each 18, and at least once.

    Args:
        keep: share of the visual tokens that stays, of which the groups' parts are taken.

    Source: PruneSID (arXiv 2603.09480, ICLR 2026) and its code for Qwen2-VL, which looks at the
    projected embeddings alone. Departures: the components are exact, where the code takes a
    randomised decomposition; groups of equal size fill up in their order; tokens that share a
    budget are one set, where the code has one image; there is no least number of 16 tokens.
    """

    keep: float = 0.333
    name: str = "prunesid"
    stage: Stage = "embeds"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.hidden is not None  # layer 0 always has embeddings
        alike = similarity(view)
        score = torch.zeros_like(view.visual, dtype=torch.float)
        for tokens, count in view.budgets():
            kept = share_of(self.keep, count)
            order = self._order(view.hidden.float(), alike, tokens, count, kept)
            score = torch.where(tokens, -order.float(), score)
        return score

    def _order(
        self, hidden: Tensor, alike: Tensor, tokens: Tensor, count: Tensor, kept: Tensor
    ) -> Tensor:
        """The place of each of the ``tokens`` [B, N], ``count`` [B, 1] of which ``kept`` stay: the
        chosen ones by group, then the others."""
        weight, group, groups = _grouped(hidden, tokens, kept)
        pairs = tokens[:, :, None] & tokens[:, None]
        upper = torch.where(pairs, alike, 0.0).triu().sum((1, 2))[:, None]
        mean = upper / (count * count).clamp_min(1)
        close = alike > (mean * (18 * kept / count.clamp_min(1)).clamp_min(1))[:, :, None]
        same = group[:, :, None] == group[:, None]
        free = _unlike_earlier(weight, tokens, pairs & same & close)
        # Within a group: those first that are free, then by weight.
        by_weight = ranks(weight, tokens)
        place = by_weight + torch.where(free, 0, by_weight.shape[1])
        before = same & pairs & (place[:, None] < place[:, :, None])
        turn = before.sum(2)
        quota = _quotas(_sizes(group, tokens, groups), _sizes(group, free, groups), kept)
        chosen = tokens & (turn < quota.gather(1, group))
        first = torch.where(chosen, group * place.shape[1] * 2 + place, 0)
        return torch.where(
            chosen, ranks(-first, chosen), ranks(weight, tokens & ~chosen) + place.shape[1]
        )


def _grouped(hidden: Tensor, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, int]:
    """The weight of each of the ``tokens`` [B, N] in its component, the number of that, and the
    most components that a row has."""
    squashed = torch.sigmoid(hidden)
    squashed = squashed - squashed.mean(-1, keepdim=True)
    squashed = squashed.masked_fill(~tokens[..., None], 0.0)
    vectors = torch.linalg.eigh(squashed @ squashed.transpose(1, 2)).eigenvectors.flip(-1)
    number = torch.arange(vectors.shape[-1], device=hidden.device)
    wanted = (kept // 4).clamp(LEAST_GROUPS, hidden.shape[-1] - 1)  # there are no more
    # Tokens that are the same (newlines) have the same weight, whatever the rounding.
    weights = (vectors.abs() * 65536).round().masked_fill(number >= wanted[..., None], -1.0)
    weight, group = weights.max(-1)
    return weight, group, vectors.shape[-1]


def _unlike_earlier(weight: Tensor, tokens: Tensor, near: Tensor) -> Tensor:
    """Of the ``tokens`` [B, N], from the largest weight on, those that are ``near`` [B, N, N] to
    none that was found before."""
    order = weight.masked_fill(~tokens, float("-inf")).sort(descending=True, stable=True).indices
    row = torch.arange(len(order), device=order.device)
    found, blocked = torch.zeros_like(tokens), ~tokens
    for turn in range(order.shape[1]):
        token = order[:, turn]
        takes = ~blocked[row, token]
        found[row, token] = takes
        blocked = blocked | (near[row, token] & takes[:, None])
    return found


def _sizes(group: Tensor, among: Tensor, groups: int) -> Tensor:
    """How many of the columns ``among`` [B, N] each group has, [B, groups]."""
    sizes = torch.zeros(len(group), groups, dtype=torch.long, device=group.device)
    return sizes.scatter_add_(1, group, among.long())


def _quotas(size: Tensor, free: Tensor, kept: Tensor) -> Tensor:
    """How many tokens of each group stay, [B, groups], of its ``size`` and of those of them that
    are ``free``; together ``kept`` [B, 1]."""
    least = size.clamp_max(1)
    most = torch.minimum(free, PER_GROUP * ((kept + 63) // 64))
    low, high = torch.zeros_like(kept), size.amax(1, keepdim=True)
    for _ in range(size.shape[1].bit_length()):  # all groups get one more, until there is room
        middle = (low + high) // 2
        enough = torch.minimum(most + middle, size).sum(1, keepdim=True) >= kept
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    most = torch.minimum(most + high, size)
    rest = (kept - least.sum(1, keepdim=True)).clamp_min(0)
    part = free.cumsum(1) / free.sum(1, keepdim=True).clamp_min(1)
    ends = (part * rest).round().long()
    quota = torch.minimum(ends.diff(dim=1, prepend=torch.zeros_like(kept)) + least, most)
    # What is missing goes to the groups with the most free tokens, as far as they have room.
    order = free.sort(dim=1, descending=True, stable=True).indices
    room = (most - quota).gather(1, order)
    missing = rest + least.sum(1, keepdim=True) - quota.sum(1, keepdim=True)
    more = (missing - (room.cumsum(1) - room)).clamp_min(0).minimum(room)
    return quota + torch.zeros_like(quota).scatter_(1, order, more)
