"""Even coverage of each image in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Shape, Stage, TokenView
from st3.methods.scores.registry import register
from st3.methods.scores.uniform import even_spread


@register
@dataclass(frozen=True)
class Grid:
    """Cover each image by an even grid, at any budget: the best quarter of the tokens are those of
    every second row and column, the best half a checkerboard (a Bayer matrix).

    The frames of a video are covered alike. An image whose tokens are no grid (newline tokens,
    tiles that a model packs), or whose grid is not known, is covered evenly in the order of its
    tokens. All images of a row have the same share kept.

    Source: uniform sampling as a baseline, arXiv 2502.11501 and 2412.13180.
    """

    name: str = "grid"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("grids",)

    def __call__(self, view: TokenView) -> Tensor:
        shapes = shapes_of(view)
        sides = [side for row in shapes for shape in row if len(shape) > 1 for side in shape[-2:]]
        bayer = _bayer(max(sides, default=1), view.ordinal.device)
        return -of_tokens(view, shapes, lambda shape: _turns(shape, bayer))


def on_stride(view: TokenView, stride: int) -> Tensor:
    """1.0 for the visual tokens on every ``stride``-th row and column of their image, else 0.0,
    [B, N]; in an image without a grid, on every ``stride * stride``-th token."""
    device = view.ordinal.device

    def strided(shape: Shape) -> Tensor:
        if len(shape) == 1:
            return torch.arange(shape[0], device=device) % (stride * stride) == 0
        rows, columns = (torch.arange(side, device=device) % stride == 0 for side in shape[-2:])
        return (rows[:, None] & columns).expand(shape).flatten()

    return of_tokens(view, shapes_of(view), lambda shape: strided(shape).float())


def shapes_of(view: TokenView) -> list[list[Shape]]:
    """For each row the shape of each image's tokens: its grid, or where there is none (count,)."""
    return [
        [_shape(count, view.grids[row][i] if view.grids else None)
         for i, count in enumerate(counts)]
        for row, counts in enumerate(view.images)
    ]  # fmt: skip


def clips_of(view: TokenView) -> list[list[Shape]]:
    """The same, with the frames of a video in one clip where each is an image of its own, as in
    models that write the time between them: neighbours of shape (1, rows, columns)."""
    rows = []
    for shapes in shapes_of(view):
        clips: list[Shape] = []
        for shape in shapes:
            before = clips[-1] if clips else ()
            if len(shape) == len(before) == 3 and shape[0] == 1 and shape[1:] == before[1:]:
                clips[-1] = (before[0] + 1, *shape[1:])
            else:
                clips.append(shape)
        rows.append(clips)
    return rows


def _shape(count: int, grid: Shape | None) -> Shape:
    return grid if grid is not None and math.prod(grid) == count else (count,)


def of_tokens(
    view: TokenView, shapes: list[list[Shape]], of_image: Callable[[Shape], Tensor]
) -> Tensor:
    """A number for each token of each image, [B, N], looked up by the tokens' ordinals."""
    made = {shape: of_image(shape) for shape in {shape for row in shapes for shape in row}}
    none = torch.zeros(1, device=view.ordinal.device)  # for rows without an image
    rows = [torch.cat([*(made[shape] for shape in row), none]) for row in shapes]
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return table.gather(1, view.ordinal.clamp(0, table.shape[1] - 1))


def _turns(shape: Shape, bayer: Tensor) -> Tensor:
    """When each token of an image is taken, as a share of the image in (0, 1), flat."""
    if len(shape) == 1:
        key = -even_spread(torch.arange(shape[0], device=bayer.device))
    else:
        key = bayer[: shape[-2], : shape[-1]].expand(shape).flatten()
    order = key.argsort(stable=True)
    turn = torch.arange(len(order), device=bayer.device) + 0.5
    return torch.empty_like(turn).scatter_(0, order, turn) / len(order)


def _bayer(side: int, device: torch.device) -> Tensor:
    """A Bayer matrix of at least ``side`` rows and columns: the smaller, the earlier taken."""
    matrix = torch.zeros(1, 1, dtype=torch.long, device=device)
    while len(matrix) < side:
        top = torch.cat([4 * matrix, 4 * matrix + 2], dim=1)
        matrix = torch.cat([top, torch.cat([4 * matrix + 3, 4 * matrix + 1], dim=1)])
    return matrix
