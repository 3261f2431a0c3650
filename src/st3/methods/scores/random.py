"""Random choice, the baseline that every score has to beat at equal budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class RandomScore:
    """A pseudo-random number in [0, 1) per visual token.

    It depends on the seed and on the token's place among its row's visual tokens alone, so a row's
    answer does not depend on what else is in the batch, nor on the device.
    """

    seed: int = 0
    name: str = "random"
    stage: Stage = "embeds"

    def __call__(self, view: TokenView) -> Tensor:
        return _uniform_hash(view.ordinal, self.seed)


def _uniform_hash(values: Tensor, seed: int) -> Tensor:
    """Integer hash (two rounds of xor-shift-multiply on 31 bits) mapped to [0, 1)."""
    mask = (1 << 31) - 1
    mixed = (values.long() + 1 + (seed & mask) * 7919) & mask
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & mask
        mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & mask
        mixed = mixed ^ (mixed >> 15)
    # 24 bits are what float32 holds exactly: no two buckets are merged by rounding.
    return (mixed >> 7).to(torch.float32) / (1 << 24)
