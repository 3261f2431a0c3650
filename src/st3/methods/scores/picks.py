"""What scores share that pick one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from st3.methods.schedule import exact
from st3.methods.scores.base import TokenView, ranks


class Picks:
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
        token = gain.masked_fill(~self.free, float("-inf")).argmax(dim=1, keepdim=True)
        # (scatter takes a number as it is; an index would copy it to the device, and wait)
        self.turn_of.scatter_(1, token, self.turn_of.gather(1, token).clamp_max(self.turn))
        self.free.scatter_(1, token, False)
        self.turn += 1
        return token[:, 0]

    def scores(self, rest: Tensor) -> Tensor:
        """Scores that give this order; tokens never picked follow by ``rest`` [B, N]."""
        behind = self.turns + ranks(rest, self.free)
        return -torch.where(self.turn_of < self.turns, self.turn_of, behind).float()


def similarity(view: TokenView) -> Tensor:
    """Cosine of all pairs of columns, [B, N, N]."""
    assert view.hidden is not None  # layer 0 always has embeddings
    unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
    return torch.matmul(unit, unit.transpose(1, 2))


def strangers(view: TokenView) -> Tensor:
    """Pairs of columns that are not both visual, or draw on different budgets, [B, N, N]."""
    pair = view.visual[:, :, None] & view.visual[:, None]
    if view.group is not None:
        pair = pair & (view.group[:, :, None] == view.group[:, None])
    return ~pair


def interleaved(first: Tensor, share: float, second: Tensor) -> Tensor:
    """Scores by the better of two places, ``first`` and ``second`` [..., N], whole numbers from 0
    on: of any number of tokens kept, about ``share`` are there by the first one. Of equals the
    earlier token is the better."""
    part = exact(share).limit_denominator(1000)
    if part in (0, 1):
        return -(first if part == 1 else second)
    # Whole numbers, so that what is equal is equal on any device.
    ahead, behind = part.denominator - part.numerator, part.numerator
    return -torch.minimum(first * ahead, second * behind)
