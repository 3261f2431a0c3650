"""Which visual tokens lie beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from st3.methods.scores.base import Shape, TokenView
from st3.methods.scores.grid import of_tokens, shapes_of
from st3.methods.upload import upload


def cells(view: TokenView) -> tuple[Tensor, Tensor, Tensor]:
    """The picture (image, or frame of a video), row and column of each visual token, [B, N] int
    each; an image that is no grid is one row."""
    shapes, device = shapes_of(view), view.ordinal.device

    def of(number: Callable[[Tensor, Shape], Tensor]) -> Tensor:
        def of_image(shape: Shape) -> Tensor:
            return number(torch.arange(math.prod(shape), device=device), shape)

        return of_tokens(view, shapes, of_image).long()

    frame = of(lambda place, shape: place // math.prod(shape[-2:]))
    row = of(lambda place, shape: place // shape[-1] % (shape[-2] if len(shape) > 1 else 1))
    column = of(lambda place, shape: place % shape[-1])
    return image_of(view) * (int(frame.max()) + 1) + frame, row, column


def image_of(view: TokenView) -> Tensor:
    """The number of each visual token's image, [B, N]."""
    most = max(map(len, view.images), default=0)
    counts = [list(row) + [0] * (most - len(row)) for row in view.images]
    ends = upload(counts, view.ordinal.device).cumsum(1)[:, :-1]
    return (view.ordinal[:, :, None] >= ends[:, None]).sum(2)


def same(*values: Tensor) -> Tensor:
    """Pairs of columns that have each of ``values`` [B, N] in common, [B, N, N] bool."""
    pairs = [value[:, :, None] == value[:, None] for value in values]
    return torch.stack(pairs).all(0)


def beside(view: TokenView) -> Tensor:
    """Pairs of visual tokens of one picture that lie left, right, above or below of each other,
    [B, N, N] bool."""
    picture, row, column = cells(view)
    apart = (row[:, :, None] - row[:, None]).abs() + (column[:, :, None] - column[:, None]).abs()
    both = view.visual[:, :, None] & view.visual[:, None]
    return both & same(picture) & (apart == 1)
