"""How much the pixels of a visual token surprise a reader who knows its neighbours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference_tower import packed
from tests.zoo import Family

Cells = dict[tuple[int, int], Tensor]


def surprises(cells: Cells, threshold: float) -> dict[tuple[int, int], float]:
    """By (row, column) the largest difference between the pixels of a cell and those predicted by
    its left, upper and upper left neighbours, as a decoder that knows what was kept has them."""
    decoded: Cells = {}
    found = {}

    def alike(one: Tensor, other: Tensor) -> bool:
        return float((one - other).abs().max()) <= threshold

    for row, column in sorted(cells):
        a = decoded.get((row, column - 1))
        b = decoded.get((row - 1, column))
        c = decoded.get((row - 1, column - 1))
        guess = a if a is not None else b
        if a is not None and b is not None and c is not None and alike(c, a) and not alike(c, b):
            guess = b
        here = cells[row, column]
        if guess is None:
            found[row, column], decoded[row, column] = math.inf, here
            continue
        found[row, column] = float((here - guess).abs().max())
        decoded[row, column] = guess if alike(here, guess) else here
    return found


def pixel_surprise(model: Any, batch: Any, family: Family, threshold: float) -> Tensor:
    """[B, T], 0 for text."""
    visual = family.visual_mask(model, batch)
    found = [
        torch.tensor(list(surprises(tile, threshold).values()), dtype=torch.double)
        for tile in _tiles(model, batch, int(visual.sum()))
    ]
    if hasattr(model.model, "pack_image_features"):
        # Newline tokens come back as 0, pixels never are.
        found = [
            torch.where(one > 0, one - 1, math.inf)
            for one in packed(model.model, batch, [one + 1 for one in found])
        ]
    full = torch.zeros(visual.shape, dtype=torch.double)
    full[visual] = torch.cat(found)
    return full.float()


def _tiles(model: Any, batch: Any, tokens: int) -> list[Cells]:
    """The pixels of each token, by (row, column), of each picture that is cut into tokens."""
    pixels, vision = batch["pixel_values"], model.config.vision_config
    if "image_grid_thw" in batch:
        # An image comes as two frames, which a processor makes equal: the first one counts.
        pixels = pixels.view(len(pixels), 3, vision.temporal_patch_size, -1)[:, :, 0]
        merge, start, tiles = vision.spatial_merge_size, 0, []
        for _, high, wide in batch["image_grid_thw"].tolist():
            cells: Cells = {}
            for row in range(high // merge):
                for column in range(wide // merge):
                    cells[row, column] = pixels[start : start + merge * merge]
                    start += merge * merge
            tiles.append(cells)
        return tiles
    pictures = [p for p in pixels.reshape(-1, *pixels.shape[-3:]) if bool((p != 0).any())]
    if hasattr(model.model, "pack_image_features"):
        side = vision.image_size // vision.patch_size
    else:
        side = math.isqrt(tokens // len(pictures))
    step = pixels.shape[-1] // side
    return [
        {
            (row, column): picture[:, row * step : (row + 1) * step, column * step :][..., :step]
            for row in range(side)
            for column in range(side)
        }
        for picture in pictures
    ]
