"""Where in the picture a visual token lies.

How a model cuts its pixel input into tokens is written down in :mod:`st3.models.layouts`. What the
processor does before that (resize, crop, pad, cut into tiles) is not modelled but measured: it is
given drawn pictures of the same sizes whose red is the horizontal and whose green is the vertical
place, and from what comes out an affine map from each tile back to its picture is read. So the
places are right for any processor, and where a map does not fit they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from st3.models.layouts import Layout, Tile, UnknownPlaces
from st3.models.parts import base_model
from st3.models.registry import config_family, families

Box = tuple[float, float, float, float]
Process = Callable[[list[Image.Image]], Mapping[str, Any]]

WORST = 0.02  # largest mean deviation of an affine map, as a share of the picture


@dataclass(frozen=True)
class Place:
    """Where one visual token lies.

    Attributes:
        picture: number of the picture: the prompt's images first, then the frames of its videos
            (pairs of frames where the model makes one of two).
        box: (left, top, right, bottom) as shares of the picture's width and height; None for tokens
            that stand for no part of it (newlines, padding).
    """

    picture: int
    box: Box | None


def places(
    model: Any,
    inputs: Mapping[str, Any],
    images: Sequence[Image.Image],
    process: Process,
) -> list[Place]:
    """The place of each visual token of a prompt, in the prompt's order.

    Args:
        model: a transformers vision-language model.
        inputs: what it was given: one row.
        images: the prompt's images, as the processor got them.
        process: makes inputs of other images of the same sizes, in the way ``inputs`` was made.

    Raises:
        UnknownPlaces: if they are not known for this model, or if what the model was given does not
            fit what is known of it. The message says which.
    """
    model = base_model(model)
    layout = check_placed(model)
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise UnknownPlaces("places are found for one row at a time")
    image_id, video_id = image_token(model.config), video_token(model.config)
    n_images = int((ids == image_id).sum())
    n_videos = 0 if video_id is None else int((ids == video_id).sum())
    has_video = any(inputs.get(key) is not None for key in ("pixel_values_videos",))
    if has_video and not n_videos and not images:  # frames that use the images' placeholder
        n_images, n_videos, video_id = 0, n_images, image_id
    of_images = iter(
        _image_places(layout, model, inputs, images, process, n_images) if n_images else []
    )
    of_videos = iter(
        _video_places(layout, model, inputs, n_videos, len(images)) if n_videos else []
    )
    found = []
    for token in ids[0].tolist():
        if token == video_id and n_videos:
            found.append(next(of_videos))
        elif token == image_id and n_images:
            found.append(next(of_images))
    return found


def check_placed(model: Any) -> Layout:
    """The layout of a model's visual tokens.

    Raises:
        UnknownPlaces: a model whose visual tokens st3 cannot place.
    """
    kind = base_model(model).config.model_type
    layout = config_family(base_model(model).config).layout
    if not layout.placed:
        known = sorted(family.model_type for family in families() if family.layout.placed)
        raise UnknownPlaces(
            f"where the visual tokens of {kind!r} models lie in the image is not known to st3 "
            f"(known: {', '.join(known)})"
        )
    return layout


def image_tiles(layout: Layout, model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[Tile]:
    """The tiles of all images of a prompt.

    Args:
        layout: of the model's family.
        model: bare.
        inputs: what the processor gave, pixels and all.
        n_tokens: image tokens that the tiles become.

    Raises:
        UnknownPlaces: inputs that do not fit what is known of the model.
    """
    try:
        return layout.tiles(model, inputs, n_tokens)
    except (KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        kind = model.config.model_type
        raise UnknownPlaces(f"the pixel input of this {kind!r} model is not understood") from error


def image_token(config: Any) -> int:
    """The id of an image's placeholder tokens."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise UnknownPlaces(f"the config of {config.model_type!r} names no image token")


def video_token(config: Any) -> int | None:
    """The id of a video's placeholder tokens, if the model has any."""
    for name in ("video_token_id", "video_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return None


def _image_places(
    layout: Layout,
    model: Any,
    inputs: Mapping[str, Any],
    images: Sequence[Image.Image],
    process: Process,
    n_tokens: int,
) -> list[Place]:
    tiles = image_tiles(layout, model, inputs, n_tokens)
    shapes = [tile.pixels.shape for tile in tiles]
    drawn = []
    for draw in (_black, _white, _chart):
        probe = process([draw(image.size, i, len(images)) for i, image in enumerate(images)])
        drawn.append(image_tiles(layout, model, probe, n_tokens))
        if [tile.pixels.shape for tile in drawn[-1]] != shapes:
            raise UnknownPlaces("the processor does not cut images of one size always alike")
    maps = []
    for trio in zip(*drawn, strict=True):
        black, white, chart = (tile.pixels.float().cpu() for tile in trio)
        maps.append(_measure(black, white, chart, images))
    boxes = [_raster(tile, found) for tile, found in zip(tiles, maps, strict=True)]
    flat = layout.arrange(model, inputs, tiles, boxes)
    pictures = layout.pictures(model, inputs, tiles, [found.picture for found in maps])
    if len(flat) != n_tokens or len(pictures) != n_tokens:
        raise UnknownPlaces(f"{n_tokens} visual tokens, but places of {len(flat)}")
    return [
        Place(picture, _clipped(box)) for picture, box in zip(pictures, flat.tolist(), strict=True)
    ]


def _video_places(
    layout: Layout, model: Any, inputs: Mapping[str, Any], n_tokens: int, first: int
) -> list[Place]:
    try:
        rasters = layout.video_rasters(model, inputs, n_tokens)
    except (KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        kind = model.config.model_type
        raise UnknownPlaces(f"the video input of this {kind!r} model is not understood") from error
    found = []
    for frame, (rows, columns) in enumerate(rasters):
        found += [
            Place(first + frame, (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows))
            for r in range(rows)
            for c in range(columns)
        ]
    spare = n_tokens - len(found)
    if not found or spare not in (0, 1):
        raise UnknownPlaces(f"{n_tokens} video tokens, but places of {len(found)}")
    return found + [Place(found[-1].picture, None)] * spare


# The processor, measured ------------------------------------------------------------------------


def _black(size: tuple[int, int], number: int, count: int) -> Image.Image:
    return Image.new("RGB", size, "black")


def _white(size: tuple[int, int], number: int, count: int) -> Image.Image:
    return Image.new("RGB", size, "white")


def _chart(size: tuple[int, int], number: int, count: int) -> Image.Image:
    """Red: the place from the left; green: from the top; blue: the image's number."""
    wide, high = size
    across = ((torch.arange(wide) + 0.5) / wide * 255).round().to(torch.uint8)
    down = ((torch.arange(high) + 0.5) / high * 255).round().to(torch.uint8)
    chart = torch.empty(high, wide, 3, dtype=torch.uint8)
    chart[..., 0], chart[..., 1] = across, down[:, None]
    chart[..., 2] = round((number + 0.5) / count * 255)
    return Image.fromarray(chart.numpy())


@dataclass(frozen=True)
class _Map:
    """From a tile's pixels to shares of a picture: ``x = across[0] * column + across[1]``. None:
    the tile shows nothing of it."""

    picture: int
    across: tuple[float, float] | None
    down: tuple[float, float] | None


def _measure(black: Tensor, white: Tensor, chart: Tensor, images: Sequence[Any]) -> _Map:
    """Read the map of one tile off the three drawn pictures, each [3, H, W]."""
    contrast = white - black
    there = contrast[0] > 0.5 * contrast[0].max()
    if contrast[0].max() <= 0 or int(there.sum()) < 4:
        return _Map(0, None, None)  # nothing but padding
    red, green, blue = ((chart - black) / contrast.clamp_min(1e-6)).unbind(0)
    picture = min(int(float(blue[there].median()) * len(images)), len(images) - 1)
    wide, high = images[picture].size
    down, across = torch.meshgrid(
        torch.arange(there.shape[0]) + 0.5, torch.arange(there.shape[1]) + 0.5, indexing="ij"
    )
    return _Map(
        picture, _line(across[there], red[there], wide), _line(down[there], green[there], high)
    )


def _line(place: Tensor, value: Tensor, pixels: int) -> tuple[float, float]:
    """Slope and intercept of ``value`` over ``place``. The outermost half pixels of the picture are
    left out where there is more: a resize repeats them.

    Raises:
        UnknownPlaces: when it is no straight line.
    """
    inner = (value > 1 / pixels) & (value < 1 - 1 / pixels)
    if len(place[inner].unique()) >= 3:
        place, value = place[inner], value[inner]
    centre, mean = place.mean(), value.mean()
    spread = ((place - centre) ** 2).sum()
    slope = ((place - centre) * (value - mean)).sum() / spread if spread > 0 else torch.tensor(0.0)
    start = mean - slope * centre
    if slope <= 0 or float((slope * place + start - value).abs().mean()) > WORST:
        raise UnknownPlaces("the processor does not just resize, crop, pad and tile its images")
    return float(slope), float(start)


def _raster(tile: Tile, found: _Map) -> Tensor:
    """The boxes of a tile's tokens, [rows * columns, 4]; NaN where it shows nothing."""
    if found.across is None or found.down is None:
        return torch.full((tile.rows * tile.columns, 4), torch.nan)
    high, wide = tile.pixels.shape[1:]
    x = found.across[0] * torch.linspace(0, wide, tile.columns + 1) + found.across[1]
    y = found.down[0] * torch.linspace(0, high, tile.rows + 1) + found.down[1]
    rows, columns = tile.rows, tile.columns
    sides = [
        x[:-1].expand(rows, columns),
        y[:-1, None].expand(rows, columns),
        x[1:].expand(rows, columns),
        y[1:, None].expand(rows, columns),
    ]
    return torch.stack(sides, dim=-1).reshape(-1, 4)


def _clipped(box: Sequence[float]) -> Box | None:
    """The part of a box within the picture; None if there is (almost) none, or for NaN."""
    left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in box)
    whole = (box[2] - box[0]) * (box[3] - box[1])
    if box[0] != box[0] or (right - left) * (bottom - top) <= 0.02 * whole:
        return None
    return (left, top, right, bottom)
