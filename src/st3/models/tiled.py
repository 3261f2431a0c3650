"""Layouts of models that pack tiles themselves (LLaVA-NeXT) or take flat patches and their grids
(Qwen-VL)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from st3.cost.vision import VisionDims
from st3.models.layouts import (
    Inputs,
    Layout,
    Raster,
    Tile,
    UnknownPlaces,
    _first,
    crops_for,
    random_pixels,
)


class AnyRes(Layout):
    """The picture as a whole, then its tiles put together, cropped and packed by the model itself.

    Args:
        newlines: tokens behind each video.
        aspect: whether the model's packing asks for an aspect ratio (LLaVA-OneVision).
    """

    placed = True

    def __init__(self, newlines: int = 0, aspect: bool = False) -> None:
        self.newlines = newlines
        self.aspect = aspect

    def tiles(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Tile]:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        counts = self._counts(model, inputs)
        pixels = inputs["pixel_values"]
        per_image = (
            [image[:count] for image, count in zip(pixels, counts, strict=True)]
            if pixels.dim() == 5
            else pixels.split(counts)
        )
        return [Tile(tile, side, side) for image in per_image for tile in image]

    def _counts(self, model: Any, inputs: Inputs) -> list[int]:
        """Tiles of each image, the whole image included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = model.config
        given = inputs.get("batch_num_images")
        sizes = inputs["image_sizes"]
        tiled = [True] * len(sizes) if given is None else [n == 1 for n in given for _ in range(n)]
        pins, side = config.image_grid_pinpoints, config.vision_config.image_size
        return [
            image_size_to_num_patches(size, pins, side) if cut else 1
            for size, cut in zip(sizes, tiled, strict=True)
        ]

    def arrange(
        self, model: Any, inputs: Inputs, tiles: Sequence[Tile], values: Sequence[Tensor]
    ) -> Tensor:
        """The model's own packing (cropping, newline tokens, shrinking), run on ``values`` in place
        of features."""
        stacked = torch.stack(list(values)).float()
        options: dict[str, Any] = {"image_newline": torch.full((stacked.shape[-1],), torch.nan)}
        if self.aspect:
            options["vision_aspect_ratio"] = (
                inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
            )
        else:
            # Only ever compared with "default", to warn of features of the wrong size.
            options["vision_feature_select_strategy"] = "full"
        features = list(stacked.split(self._counts(model, inputs)))
        sizes = inputs["image_sizes"].cpu()
        packed, _ = model.model.pack_image_features(features, sizes, **options)
        return torch.cat(list(packed))

    def pictures(
        self, model: Any, inputs: Inputs, tiles: Sequence[Tile], numbers: Sequence[int]
    ) -> list[int]:
        """Newline tokens belong to the picture before them."""
        values = [
            torch.full((tile.rows * tile.columns, 1), float(number))
            for tile, number in zip(tiles, numbers, strict=True)
        ]
        found: list[int] = []
        for number in self.arrange(model, inputs, tiles, values)[:, 0].tolist():
            found.append(found[-1] if number != number else round(number))
        return found

    def video_rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Raster]:
        videos = inputs.get("pixel_values_videos")
        if videos is None:
            videos = inputs["pixel_values"]  # of the encoder, on transformers 5.16
        frames = videos.shape[0] * videos.shape[1]
        newlines = self.newlines * len(videos)
        side = math.isqrt((n_tokens - newlines) // frames)
        if side * side * frames + newlines != n_tokens or len(videos) > 1:
            return super().video_rasters(model, inputs, n_tokens)
        return [(side, side)] * frames

    def bench_inputs(
        self, model: Any, dims: VisionDims, visual: int, batch: int
    ) -> dict[str, Any] | None:
        if dims.crop_patches is None or self.aspect:
            return None
        crops = crops_for(dims, visual)
        side = int(_first(model.config.vision_config.image_size))
        size = image_size(model.config.image_grid_pinpoints, side, crops)
        if size is None:
            return None
        return {
            "pixel_values": random_pixels(model, batch, crops, 3, side, side),
            "image_sizes": torch.tensor([size] * batch, device=model.device),
        }


def image_size(pinpoints: list[list[int]], side: int, crops: int) -> list[int] | None:
    """An image size that LLaVA-NeXT cuts into so many crops; None if there is none.

    Args:
        pinpoints: the model's [height, width] of tiled images, in pixels.
        side: of a crop, in pixels.
        crops: wanted, the overview among them.
    """
    for height, width in pinpoints:
        if (height // side) * (width // side) + 1 == crops:
            return [height, width]
    return None


class Patches(Layout):
    """Flat patches of all pictures, and the grid of each (``image_grid_thw``).

    Args:
        reading: patches stand in reading order; else those that become one token stand together.
        framed: a token before an image, behind each of its rows and at its end (HunYuan-VL).
    """

    placed = True

    def __init__(self, reading: bool = False, framed: bool = False) -> None:
        self.reading = reading
        self.framed = framed

    def tiles(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Tile]:
        patches, grids = inputs["pixel_values"], inputs["image_grid_thw"].tolist()
        size = model.config.vision_config.patch_size
        found, start = [], 0
        merges = self._merges(model, inputs, "image", len(grids))
        for (moments, high, wide), merge in zip(grids, merges, strict=True):
            for _ in range(moments):
                flat = patches[start : start + high * wide]
                start += high * wide
                if self.reading:
                    cells = flat.reshape(high, wide, 3, -1, size, size)[:, :, :, 0]
                    pixels = cells.permute(2, 0, 3, 1, 4)
                else:
                    split = (high // merge, wide // merge, merge, merge)
                    cells = flat.reshape(*split, 3, -1, size, size)[:, :, :, :, :, 0]
                    pixels = cells.permute(4, 0, 2, 5, 1, 3, 6)
                pixels = pixels.reshape(3, high * size, wide * size)
                found.append(Tile(pixels, high // merge, wide // merge))
        return found

    def _merges(self, model: Any, inputs: Inputs, kind: str, count: int) -> list[int]:
        """Patches to a token and side, for each of ``count`` images or videos."""
        own = inputs.get(f"{kind}_merge_sizes")
        if own is None:
            return [merge_size(model.config.vision_config)] * count
        return [int(size) for size in own]

    def tokens_of(self, tile: Tile) -> int:
        if not self.framed:
            return super().tokens_of(tile)
        return tile.rows * (tile.columns + 1) + 2

    def arrange(
        self, model: Any, inputs: Inputs, tiles: Sequence[Tile], values: Sequence[Tensor]
    ) -> Tensor:
        if not self.framed:
            return super().arrange(model, inputs, tiles, values)
        found = []
        for tile, value in zip(tiles, values, strict=True):
            nowhere = value.new_full((1, value.shape[1]), torch.nan)
            rows = value.view(tile.rows, tile.columns, -1)
            ended = torch.cat([rows, nowhere.expand(tile.rows, 1, -1)], dim=1)
            found += [nowhere, ended.flatten(0, 1), nowhere]
        return torch.cat(found)

    def rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> Iterator[Raster]:
        if self.framed:
            raise UnknownPlaces("tokens before, between and after the rows count as visual")
        yield from self._grids(model, inputs, "image")

    def video_rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> list[Raster]:
        if self.reading:
            return super().video_rasters(model, inputs, n_tokens)
        return list(self._grids(model, inputs, "video"))

    def _grids(self, model: Any, inputs: Inputs, kind: str) -> Iterator[Raster]:
        grids = inputs[f"{kind}_grid_thw"].tolist()
        merges = self._merges(model, inputs, kind, len(grids))
        for (moments, high, wide), merge in zip(grids, merges, strict=True):
            yield from [(high // merge, wide // merge)] * moments

    def bench_inputs(
        self, model: Any, dims: VisionDims, visual: int, batch: int
    ) -> dict[str, Any] | None:
        """One image for each row, as square as its number of tokens allows."""
        merge = merge_size(model.config.vision_config)
        high = max(n for n in range(1, math.isqrt(visual) + 1) if visual % n == 0)
        grid = [1, high * merge, visual // high * merge]
        return {
            "pixel_values": random_pixels(model, batch * math.prod(grid), dims.patch),
            "image_grid_thw": torch.tensor([grid] * batch, device=model.device),
        }


class EndedRows(Layout):
    """Each row of discrete codes ends with a token that counts as visual (Emu 3)."""

    def rasters(self, model: Any, inputs: Inputs, n_tokens: int) -> Iterator[Raster]:
        factor = 2 ** (len(model.config.vq_config.channel_multiplier) - 1)
        for high, wide in inputs["image_sizes"].tolist():
            yield int(high) // factor, int(wide) // factor + 1


def merge_size(vision: Any) -> int:
    """Patches to a token and side, as the vision config calls it."""
    for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"):
        size = getattr(vision, name, None)
        if size is not None:
            return int(_first(size))
    raise UnknownPlaces("how many patches become one token is not known")
