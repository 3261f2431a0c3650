"""What a shallow layer of the vision tower looks at in each window, and a deep one anywhere; within
the decoder the last token's attention: VScan's scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.attention import Attention
from st3.methods.scores.base import Score, Stage, TokenView, ranks, share_of
from st3.methods.scores.looks import Look
from st3.methods.scores.neighbours import cells, same
from st3.methods.scores.picks import interleaved
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class LocalGlobal:
    """Half of the tokens by the attention of a shallow layer of the vision tower, as many from each
    window of the image; the others by that of the layer behind the features, from anywhere. What is
    dropped within the decoder goes by its attention.

    Where it is not known how many tokens stay (``keep`` is None), a token counts by the better of
    its two places.

    Args:
        local: the share of the kept tokens that come from the windows.
        side: of a window, in tokens.
        depth: the shallow layer, as a share of the tower's layers.
        keep: share of the visual tokens that the drop before the decoder leaves.

    Source: VScan (arXiv 2505.22654) and its code: windows of 6 x 6, the 6th of 24 layers.
    Departures: dropped tokens are not averaged into kept ones; where a tower has no class token, a
    token's attention is what it receives; a number of tokens that is no multiple of the windows is
    filled up window by window, in the order of the tokens.
    """

    local: float = 0.5
    side: int = 6
    depth: float = 0.25
    keep: float | None = None
    later: Score = field(default_factory=Attention)
    name: str = "vscan"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("tower", "grids")

    def __post_init__(self) -> None:
        check_share("local", self.local)
        check_share("depth", self.depth)
        if self.keep is not None:
            check_share("keep", self.keep)

    @property
    def looks(self) -> tuple[Look, ...]:
        return Look("class", self.depth), Look("class")

    def __call__(self, view: TokenView) -> Tensor:
        assert view.towers is not None  # the engine gives it or refuses
        shallow, deep = view.towers
        picture, row, column = cells(view)
        together = same(picture, row // self.side, column // self.side)
        score = torch.zeros_like(deep)
        for tokens, count in view.budgets():
            turn = _turn_in_window(shallow, tokens, together)
            by_turn, by_deep = ranks(-turn, tokens), ranks(deep, tokens)
            if self.keep is None:
                order = -interleaved(by_turn.float(), self.local, by_deep.float())
            else:
                half = share_of(self.local, share_of(self.keep, count))
                first = tokens & (by_turn < half)
                rest = ranks(deep, tokens & ~first)
                order = torch.where(first, by_turn, half + rest).float()
            score = torch.where(tokens, -order, score)
        return score


def _turn_in_window(weights: Tensor, tokens: Tensor, together: Tensor) -> Tensor:
    """When each of the ``tokens`` [B, N] is taken from its window by ``weights``, as a share of the
    window: equal for the best ones of windows of one size."""
    pairs = together & tokens[:, :, None] & tokens[:, None]
    place = torch.arange(weights.shape[1], device=weights.device)
    earlier = place[None, :, None] > place[None, None]
    before = weights[:, None] > weights[:, :, None]
    before = before | ((weights[:, None] == weights[:, :, None]) & earlier)
    size = pairs.sum(2).clamp_min(1)
    return ((pairs & before).sum(2) + 0.5) / size
