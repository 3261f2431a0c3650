"""How a model's pixel input is cut into visual tokens: the half of the way from a token to its
place in the picture that the model decides. The other half, from the picture to the pixel input, is
the processor's, and is measured in :mod:`st3.models.places`.

A *raster* is a run of visual tokens in reading order, as (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st3.cost.vision import VisionDims
from st3.models.visual import Encoded

Raster = tuple[int, int]
Inputs = Mapping[str, Any]


class UnknownPlaces(ValueError):
    """Where the visual tokens lie in the picture is not known."""


@dataclass(frozen=True)
class Tile:
    """A part of the pixel input that becomes ``rows x columns`` tokens, in reading order.

    Attributes:
        pixels: [3, H, W], as the processor left them.
    """

    pixels: Tensor
    rows: int
    columns: int


class Layout:
    """A layout of which nothing is known.

    Arguments that its methods share: ``model``, bare; ``inputs``, the arguments of its forward or
    its encoder, pixels and all; ``n_tokens``, the visual tokens that came of them; ``tiles``, of
    :meth:`tiles`. They raise UnknownPlaces for inputs that do not fit what is known of the model.
    """

    placed = False  # whether the tokens' places in the pixel input are known

    def tiles(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Tile]:
        """The tiles of all images of a prompt, which become its ``n_tokens`` image tokens."""
        raise UnknownPlaces(
            f"where the visual tokens of {model.config.model_type!r} models lie in the image is "
            "not known to st3"
        )

    def tokens_of(self, tile: Tile) -> int:
        """Visual tokens that a tile becomes."""
        return tile.rows * tile.columns

    def arrange(
        self, model: Any, inputs: Inputs, tiles: Sequence[Tile], values: Sequence[Tensor]
    ) -> Tensor:
        """``values`` of the tiles' cells, [rows * columns, D] each, as those of the prompt's visual
        tokens, [tokens, D]; NaN for tokens that stand for no cell (newlines)."""
        return torch.cat(list(values))

    def pictures(
        self, model: Any, inputs: Inputs, tiles: Sequence[Tile], numbers: Sequence[int]
    ) -> list[int]:
        """The picture of each visual token, from the ``numbers`` of each tile's, from 0."""
        pairs = zip(tiles, numbers, strict=True)
        return [number for tile, number in pairs for _ in range(self.tokens_of(tile))]

    def all_rasters(
        self, model: Any, encoded: Sequence[Encoded], counts: Sequence[int]
    ) -> Iterator[Raster]:
        """The rasters of all images of a batch, or of all videos, in order.

        Args:
            encoded: what the model encoded them from.
            counts: visual tokens of each run, over all rows.

        Raises:
            UnknownPlaces: where an image is no raster.
        """
        if len({call.video for call in encoded}) != 1:
            raise UnknownPlaces("the order of images and videos is not in the pixel input")
        for call in encoded:
            if call.video:
                yield from self.video_rasters(model, call.inputs, call.tokens)
            else:
                yield from self.rasters(model, call.inputs, call.tokens)

    def rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> Iterator[Raster]:
        """The rasters of images, by the encoder's arguments and its number of tokens."""
        raise UnknownPlaces("images are no rasters")

    def video_rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Raster]:
        """The raster of each frame (or pair of frames that become one) of the prompts' videos.
        Tokens of a video behind its last frame are left over."""
        raise UnknownPlaces(
            f"where the video tokens of this {model.config.model_type!r} model lie is not known "
            "to st3"
        )

    def crop(self, config: Any) -> dict[str, Any] | None:
        """Arguments of ``get_image_features`` for one crop, without numbers; None where crops are
        of no one size."""
        return None

    def bench_inputs(
        self, model: Any, dims: VisionDims, visual: int, batch: int
    ) -> dict[str, Any] | None:
        """Random arguments of ``get_image_features``, on the model's device and in its dtype, that
        give each of ``batch`` rows about ``visual`` tokens; None where st3 cannot make any. dims:
        of the vision tower."""
        return None


class Squares(Layout):
    """Each tile, in the order of the pixel input, is one square raster of tokens.

    Args:
        placed: False where a token sees more of the image than its own cell, or the row of tiles
            is not that of the pixel input.
        nested: pixel_values are [B, tiles, 3, H, W], filled up with empty tiles.
    """

    def __init__(self, placed: bool = True, nested: bool = False) -> None:
        self.placed = placed
        self.nested = nested

    def tiles(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Tile]:
        if not self.placed:
            return super().tiles(model, inputs, n_tokens)
        pixels = inputs["pixel_values"].flatten(0, -4)
        if self.nested:
            pixels = pixels[pixels.flatten(1).any(1)]
        side = _side(n_tokens, len(pixels))
        return [Tile(tile, side, side) for tile in pixels]

    def all_rasters(
        self, model: Any, encoded: Sequence[Encoded], counts: Sequence[int]
    ) -> Iterator[Raster]:
        if not self.nested:
            return super().all_rasters(model, encoded, counts)
        return ((_side(count, 1),) * 2 for count in counts)  # each tile is a run

    def rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> Iterator[Raster]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            pixels = inputs["pixel_values_images"]  # Video-LLaVA on transformers 5.16
        number = math.prod(pixels.shape[:-3])
        yield from [(_side(n_tokens, number),) * 2] * number

    def crop(self, config: Any) -> dict[str, Any] | None:
        size = getattr(config.vision_config, "image_size", None)
        if self.nested or size is None:
            return None
        side = int(_first(size))
        return {"pixel_values": torch.empty(1, 3, side, side, device="meta")}

    def bench_inputs(
        self, model: Any, dims: VisionDims, visual: int, batch: int
    ) -> dict[str, Any] | None:
        if dims.crop_patches is None:
            return None
        crops = crops_for(dims, visual)
        side = int(_first(model.config.vision_config.image_size))
        leading = (batch, crops) if self.nested else (batch * crops,)
        return {"pixel_values": random_pixels(model, *leading, 3, side, side)}


class RowRuns(Layout):
    """Text stands between the rows of patches: each run of visual tokens is one row."""

    def all_rasters(
        self, model: Any, encoded: Sequence[Encoded], counts: Sequence[int]
    ) -> Iterator[Raster]:
        return ((1, count) for count in counts)


class Pixtral(Layout):
    """Pictures of any size in the corner of a padded one."""

    placed = True

    def _shapes(self, model: Any, inputs: Inputs) -> Iterator[tuple[int, int, int]]:
        """Height and width of each image in pixels, and the pixels of a token's side."""
        config = model.config
        cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        for high, wide in inputs["image_sizes"].tolist():
            yield high, wide, cell

    def tiles(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Tile]:
        images = zip(inputs["pixel_values"], self._shapes(model, inputs), strict=True)
        return [
            Tile(image[:, :high, :wide], high // cell, wide // cell)
            for image, (high, wide, cell) in images
        ]

    def rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> Iterator[Raster]:
        for high, wide, cell in self._shapes(model, inputs):
            yield high // cell, wide // cell


class SquaresOrPixtral(Squares):
    """LLaVA's layout, whose tower may be Pixtral's."""

    def _layout(self, model: Any) -> Layout:
        pixtral = getattr(model.config.vision_config, "model_type", "") == "pixtral"
        return Pixtral() if pixtral else Squares()

    def tiles(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Tile]:
        return self._layout(model).tiles(model, inputs, n_tokens)

    def rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> Iterator[Raster]:
        return self._layout(model).rasters(model, inputs, n_tokens)


class Positioned(Layout):
    """Flat patches, and the place of each of them; some are padding (Gemma 4).

    Args:
        pooled: whether the model makes one token of ``pooling_kernel_size`` squared patches.
    """

    placed = True

    def __init__(self, pooled: bool = True) -> None:
        self.pooled = pooled

    def _pool(self, model: Any) -> int:
        return int(model.config.vision_config.pooling_kernel_size) if self.pooled else 1

    def tiles(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Tile]:
        pool, found = self._pool(model), []
        for patches, places in zip(
            inputs["pixel_values"], inputs["image_position_ids"], strict=True
        ):
            there = places[:, 0] >= 0
            x, y = places[there].unbind(1)
            wide, high = int(x.max()) + 1, int(y.max()) + 1
            side = math.isqrt(patches.shape[1] // 3)
            pixels = patches.new_zeros(high, wide, side, side, 3)
            pixels[y, x] = patches[there].reshape(-1, side, side, 3)
            pixels = pixels.permute(4, 0, 2, 1, 3).reshape(3, high * side, wide * side)
            found.append(Tile(pixels, high // pool, wide // pool))
        return found

    def rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> Iterator[Raster]:
        yield from self._rasters(model, inputs["image_position_ids"])

    def video_rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Raster]:
        return list(self._rasters(model, inputs["video_position_ids"].flatten(0, -3)))

    def _rasters(self, model: Any, places: Tensor) -> Iterator[Raster]:
        """``places`` [pictures, patches, 2] as (x, y); -1 for padding."""
        pool = self._pool(model)
        for wide, high in (places.amax(1) + 1).tolist():
            yield high // pool, wide // pool


def _side(n_tokens: int, tiles: int) -> int:
    side = math.isqrt(n_tokens // tiles) if tiles else 0
    if side < 1 or side * side * tiles != n_tokens:
        raise UnknownPlaces(
            f"{n_tokens} visual tokens are not a square grid on each of {tiles} tiles"
        )
    return side


def _first(size: Any) -> Any:
    return size[0] if isinstance(size, (list, tuple)) else size


def crops_for(dims: VisionDims, visual: int) -> int:
    """How many crops of a tower of one size give at least ``visual`` tokens."""
    return math.ceil(visual / ((dims.crop_patches or 1) / dims.patches_per_token))


def random_pixels(model: Any, *shape: int) -> Tensor:
    """Random pixels on the model's device and in its dtype."""
    return torch.rand(shape, device=model.device, dtype=torch.float32).to(model.dtype)
