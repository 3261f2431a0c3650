"""An even grid, and in between what stands out in every window of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Score, Shape, Stage, TokenView, ranks
from st3.methods.scores.grid import Grid, of_tokens, shapes_of
from st3.methods.scores.looks import Look
from st3.methods.scores.mixed import Mixed
from st3.methods.scores.neighbours import image_of
from st3.methods.scores.picks import interleaved
from st3.methods.scores.registry import register

SHARPNESS = 20.0  # of likeness: cosine 0.9 counts for an eighth of cosine 1
_ROWS = 1024  # tokens whose likeness to all others is held at a time


@register
@dataclass(frozen=True)
class Standout:
    """A token counts by the better of two places: in an even grid, and among those that stand out,
    of which each window of the image has the same share.

    A token stands out by the attention that it receives in the vision tower. Where the tower's
    attention cannot be followed to the tokens (a family whose way is not known, videos, ready-made
    features), it stands out by how few other tokens of its row are like it: minus the logarithm of
    the mean of ``exp(20 (cosine - 1))`` over them, of the embeddings.

    It needs no question, so that what is kept before the decoder serves any question. With
    ``every``, what is dropped within the decoder goes by this order and, at every n-th place, by
    the last token's attention.

    Args:
        share: of any number of tokens about this share is there because it stands out.
        window: side of a window, in tokens. A video's windows lie in a frame; an image that is no
            grid is cut into runs of ``window * window`` tokens.
        every: one place in so many is the attention's, for the drops within the decoder; None: the
            order alone.
        tower: whether the tower is asked at all.

    Source: this project's, of parts that others have: the attention that the tower's tokens receive
    is VisionZip's measure (arXiv 2412.04467), as many from each window VScan's (arXiv 2505.22654),
    a grid beside attention FEATHER's (arXiv 2412.13180). Its own are the two places joined at any
    number of tokens, and what stands in for the tower.
    """

    share: float = 0.667
    window: int = 4
    every: int | None = None
    tower: bool = True
    name: str = "standout"
    stage: Stage = "embeds"
    spares: tuple[str, ...] = ("tower",)

    def __post_init__(self) -> None:
        check_share("share", self.share)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a side in tokens, at least 1, got {self.window!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("tower", "grids") if self.tower else ("grids",)

    @property
    def looks(self) -> tuple[Look, ...]:
        return (Look("received"),)

    @cached_property
    def later(self) -> Score | None:
        """The score of the drops within the decoder."""
        return None if self.every is None else Mixed(self.every, cover=self)

    def prepare(self, view: TokenView) -> Tensor:
        """The order, which the drops within the decoder go by as well, [B, N]."""
        tower, visual = view.tower, view.visual
        salience = _rarity(view) if tower is None else tower.float()
        by_salience = ranks(salience, visual)
        by_window = self._by_window(view, by_salience)
        by_grid = ranks(Grid()(view), visual)
        return interleaved(by_window.float(), self.share, by_grid.float())

    def __call__(self, view: TokenView) -> Tensor:
        return self.prepare(view) if view.prepared is None else view.prepared

    def _by_window(self, view: TokenView, place: Tensor) -> Tensor:
        """The place of each visual token, [B, N]: by its turn in its window, as a share of the
        window, and of equal turns by ``place`` [B, N], whole numbers from 0 on."""
        number, most = self._windows(view)
        columns = place.shape[1]
        number = number.masked_fill(~view.visual, most)
        order = (number * columns + place).argsort(dim=1)
        at = torch.arange(columns, device=place.device).expand_as(order)
        behind = torch.empty_like(order).scatter_(1, order, at)
        size = number.new_zeros(len(number), most + 1).scatter_add_(
            1, number, torch.ones_like(number)
        )
        first = size.cumsum(1) - size
        # A quotient of the same numbers is the same on any device.
        turn = (behind - first.gather(1, number) + 0.5) / size.gather(1, number)
        turn = turn.masked_fill(~view.visual, 2.0)  # behind all others
        by_place = place.argsort(dim=1)
        again = turn.gather(1, by_place).argsort(dim=1, stable=True)
        order = by_place.gather(1, again)
        return torch.empty_like(order).scatter_(1, order, at)

    def _windows(self, view: TokenView) -> tuple[Tensor, int]:
        """The window of each visual token, [B, N], and a number above all of them."""
        shapes, device = shapes_of(view), view.ordinal.device
        counts = [_count(shape, self.window) for row in shapes for shape in row]
        most = max(counts, default=1)
        images = max(map(len, shapes), default=1)
        inside = of_tokens(view, shapes, lambda shape: _number(shape, self.window, device).float())
        return image_of(view) * most + inside.long(), most * max(1, images)


def _count(shape: Shape, side: int) -> int:
    if len(shape) == 1:
        return math.ceil(shape[0] / (side * side))
    rows, columns = (math.ceil(length / side) for length in shape[-2:])
    return math.prod(shape[:-2]) * rows * columns


def _number(shape: Shape, side: int, device: torch.device) -> Tensor:
    """The window of each token of an image, flat."""
    if len(shape) == 1:
        return torch.arange(shape[0], device=device) // (side * side)
    rows, columns = (torch.arange(length, device=device) // side for length in shape[-2:])
    wide, high = math.ceil(shape[-1] / side), math.ceil(shape[-2] / side)
    frame = torch.arange(math.prod(shape[:-2]), device=device)
    number = (frame[:, None, None] * high + rows[:, None]) * wide + columns
    return number.flatten()


def _rarity(view: TokenView) -> Tensor:
    """How few other visual tokens of its row each token is like, [B, N]."""
    assert view.hidden is not None  # layer 0 always has embeddings
    unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
    unit = unit * view.visual[..., None]
    others, like = view.visual[:, None], []
    for first in range(0, unit.shape[1], _ROWS):
        cosine = torch.matmul(unit[:, first : first + _ROWS], unit.transpose(1, 2))
        each = ((cosine - 1) * SHARPNESS).exp() * others
        each.diagonal(offset=first, dim1=1, dim2=2).zero_()  # itself would drown small numbers
        like.append(each.sum(-1))
    return -torch.cat(like, dim=1).log()
