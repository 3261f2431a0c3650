"""Two rankings joined: what covers the image, and what is attended."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from st3.methods.scores.attention import Attention
from st3.methods.scores.base import LayerView, Score, Stage, TokenView, needs_of, ranks
from st3.methods.scores.grid import Grid
from st3.methods.scores.registry import register

EVERY = 6


@register
@dataclass(frozen=True)
class Mixed:
    """The best tokens of an even grid, and at every sixth place the best by attention that is not
    among them.

    Attention alone keeps many tokens of what the prompt's last token looks at and few of the rest,
    which counting and long descriptions come back to: a model that counts by how much of the image
    an object fills is misled by any choice that changes that share. A grid alone loses what is
    small. At any budget, about one of ``every`` tokens kept is there for the attention it draws.

    Args:
        every: one place in so many is the attention's, at least 2.

    Source: the idea of attention plus a grid is FEATHER's (arXiv 2412.13180), which takes the grid
    at the first drop alone and attention without RoPE.
    """

    forms: ClassVar[str] = "mixed2, mixed3 ..."

    every: int = EVERY
    attention: Score = field(default_factory=Attention)
    cover: Score = field(default_factory=Grid)
    stage: Stage = "attention"

    def __post_init__(self) -> None:
        if self.every < 2:
            raise ValueError(
                f"mixed{self.every} leaves nothing to the grid: use mixed2 or more, or attention"
            )

    @classmethod
    def named(cls, name: str) -> Mixed | None:
        """The score that a name such as "mixed4" says; None for other names."""
        number = name.removeprefix("mixed")
        return cls(int(number)) if number != name and number.isdecimal() else None

    @property
    def name(self) -> str:
        return "mixed" if self.every == EVERY else f"mixed{self.every}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (*needs_of(self.attention), *needs_of(self.cover))

    @property
    def last_row(self) -> bool:
        """Whether of a layer's attention it reads the last row alone."""
        return getattr(self.attention, "last_row", False)

    def prepare(self, view: TokenView) -> Tensor:
        """The cover's score, which does not change from layer to layer, [B, N]."""
        return self.cover(view)

    def __call__(self, view: LayerView) -> Tensor:
        cover = self.cover(view) if view.prepared is None else view.prepared
        # Before it is ranked: a mean of ranks is not the rank of a mean.
        attention = view.over_ranks(self.attention(view))
        worth = _worth(self.every, attention.shape[-1], attention.device)
        return ranks(torch.stack((attention, cover)), view.visual, worth).amax(dim=0)


def _worth(every: int, columns: int, device: torch.device) -> Tensor:
    """What it is worth to be the n-th by attention, and the n-th of the cover, [2, 1, N]: minus the
    place that a token gets by it."""
    return _all_worth(every, 1 << (columns - 1).bit_length(), device)[..., :columns]


@lru_cache(maxsize=8)
def _all_worth(every: int, columns: int, device: torch.device) -> Tensor:
    number, turns = torch.arange(columns, device=device), every - 1
    by_attention = number * every + turns
    by_cover = number + number // turns  # all places but every sixth
    return torch.stack((by_attention, by_cover))[:, None] * -1.0
