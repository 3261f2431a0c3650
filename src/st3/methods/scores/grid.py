"""Even coverage of each image in both directions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.uniform import even_spread

Images = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Grid:
    """Cover each image by an even grid, at any budget: the best quarter of the tokens are those of
    every second row and column, the best half a checkerboard (a Bayer matrix).

    An image whose tokens are no square grid (newline tokens, tiles, other aspect ratios) is covered
    evenly in the order of its tokens. All images of a row have the same share kept.

    Source: uniform sampling as a baseline, arXiv 2502.11501 and 2412.13180.
    """

    name: str = "grid"
    stage: Stage = "embeds"

    def __call__(self, view: TokenView) -> Tensor:
        return -_by_ordinal(_places, view.images, view.ordinal)


def on_stride(images: Images, stride: int, ordinal: Tensor) -> Tensor:
    """1.0 for the visual tokens on every ``stride``-th row and column of their image, else 0.0,
    [B, N]; in an image that is no square grid, on every ``stride * stride``-th token."""
    return _by_ordinal(functools.partial(_strided, stride), images, ordinal)


def _by_ordinal(
    of_image: Callable[[int], Sequence[float]], images: Images, ordinal: Tensor
) -> Tensor:
    """A number for each token of each image, [B, N], looked up by the tokens' ordinals."""
    rows = [[value for n in row for value in of_image(n)] for row in images]
    width = max(1, *map(len, rows))
    table = torch.tensor([row + [0.0] * (width - len(row)) for row in rows], device=ordinal.device)
    return table.gather(1, ordinal.clamp(0, width - 1))


def _side(count: int) -> int | None:
    side = math.isqrt(count)
    return side if side * side == count else None


@functools.cache
def _strided(stride: int, count: int) -> tuple[float, ...]:
    side = _side(count)
    if side is None:
        return tuple(float(i % (stride * stride) == 0) for i in range(count))
    return tuple(float(i // side % stride == 0 and i % side % stride == 0) for i in range(count))


@functools.cache
def _places(count: int) -> tuple[float, ...]:
    """When each token of an image of ``count`` is taken, as a share of the image in (0, 1)."""
    side = _side(count)
    if side is None:
        spread = even_spread(torch.arange(count))
        order = spread.argsort(descending=True, stable=True).tolist()
    else:
        order = sorted(range(count), key=lambda i: _bayer(i // side, i % side, side.bit_length()))
    places = [0.0] * count
    for place, token in enumerate(order):
        places[token] = (place + 0.5) / count
    return tuple(places)


def _bayer(y: int, x: int, bits: int) -> int:
    """The Bayer matrix of side ``2 ** bits``: bits of ``x ^ y`` and ``y``, from the lowest on, each
    finer step counting less."""
    value = 0
    for bit in range(bits):
        value = value << 2 | ((x ^ y) >> bit & 1) << 1 | y >> bit & 1
    return value
