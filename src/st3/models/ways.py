"""The way from a vision tower's patches to a model's visual tokens, for what patches were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches."""


class Way:
    """Each patch is a visual token, in order.

    Attributes:
        packs: whether tokens are put together by the model's own ``pack_image_features`` (tiles,
            cut to the picture's shape, with newline tokens in between, which get 0).
    """

    packs = False

    def tokens(self, inner: Any, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """From patches to tokens.

        Args:
            inner: the model inside.
            patches: [looks, images, patches]; images of different sizes stand behind each other, as
                one image.
            grids: frames, rows and columns of each image's patches, if the tower was told.

        Returns:
            [looks, images, tokens of an image]; of packed images [looks, tiles, tokens of a tile].
        """
        return patches


class Packed(Way):
    """LLaVA-NeXT's tiles."""

    packs = True


class Blocks(Way):
    """A token for each block of patches, blocks in reading order (Gemma 3, SmolVLM).

    Args:
        side: patches along a block's side, from the model's config.
    """

    def __init__(self, side: Callable[[Any], int]) -> None:
        self.side = side

    def tokens(self, inner: Any, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        block, across = self.side(inner.config), round(patches.shape[-1] ** 0.5)
        blocks = patches.unflatten(2, (across // block, block, across // block, block))
        return blocks.mean((3, 5)).flatten(2)


class Shuffled(Way):
    """Patches joined by the model's own ``pixel_shuffle`` (InternVL)."""

    def tokens(self, inner: Any, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        across, ratio = round(patches.shape[-1] ** 0.5), inner.config.downsample_ratio
        squares = patches.flatten(0, 1).view(-1, across, across, 1)
        joined = inner.pixel_shuffle(squares, scale_factor=ratio).mean(-1)
        return joined.flatten(1).unflatten(0, patches.shape[:2])


class Merged(Way):
    """Patches that become one token stand behind each other (Qwen-VL).

    Args:
        windowed: whether the tower's layers see the tokens window by window (Qwen2.5-VL).
    """

    def __init__(self, windowed: bool = False) -> None:
        self.windowed = windowed

    def tokens(self, inner: Any, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        vision = inner.config.vision_config
        merge = vision.spatial_merge_size
        tokens = patches.unflatten(2, (-1, merge * merge)).mean(-1)
        if not self.windowed:
            return tokens
        side = vision.window_size // merge // vision.patch_size
        place = by_windows([(t, h // merge, w // merge) for t, h, w in grids], side)
        read = torch.empty_like(tokens)
        read[..., place.to(tokens.device)] = tokens
        return read


def by_windows(grids: Sequence[Grid], side: int) -> Tensor:
    """The place in reading order of each token of the ``grids``, in windows of ``side`` tokens in
    both directions, one window behind the other."""
    places, start = [], 0
    for frames, rows, columns in grids:
        every = torch.arange(frames * rows * columns)
        row, column = every // columns % rows, every % columns
        window = (every // (rows * columns) * rows + row // side) * columns + column // side
        within = row % side * side + column % side
        places.append(start + (window * side * side + within).argsort(stable=True))
        start += len(every)
    return torch.cat(places)
