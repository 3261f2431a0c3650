"""How a model's pixel input is cut into visual tokens: the half of the way from a token to its
place in the picture that the model decides. The other half, from the picture to the pixel input, is
the processor's, and is measured in :mod:`st3.models.places`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


# Each tile, in the order of the pixel input, is one square raster of tokens.
SQUARES = frozenset(
    [
        "llava",
        "vipllava",
        "paligemma",
        "gemma3",
        "internvl",
        "aya_vision",
        "cohere2_vision",
        "idefics3",
        "smolvlm",
        "granite_docling",
        "deepseek_vl",
        "janus",
        "ovis2",
        "qianfan_ocr",
        "perception_lm",
    ]
)
# The picture as a whole, then its tiles put together, cropped and packed by the model itself.
ANYRES = frozenset(("llava_next", "llava_next_video", "llava_onevision"))
# Flat patches and a grid; merged patches stand together...
GRIDS = frozenset(
    [
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen2_5_omni_thinker",
        "qwen3_omni_moe_thinker",
        "glm4v",
        "glm4v_moe",
        "glm46v",
        "glm_ocr",
        "ernie4_5_vl_moe",
        "video_llama_3",
        "exaone4_5",
        "cohere_compass",
        "cosmos3_edge",
        "cosmos3_omni",
        "hyperclovax_vision_v2",
    ]
)
# ... or in reading order.
READING_GRIDS = frozenset(("paddleocr_vl", "kimi_k25", "hunyuan_vl", "muse_glimmer", "muse_spark"))
# Pictures of any size in the corner of a padded one.
PIXTRAL = frozenset(("mistral3", "lighton_ocr"))
POSITIONED = frozenset(("gemma4", "gemma4_unified"))
KNOWN = SQUARES | ANYRES | GRIDS | READING_GRIDS | PIXTRAL | POSITIONED
"""`config.model_type` of the models whose visual tokens st3 can place in the picture."""


def check_known(model_type: str) -> None:
    """Raise UnknownPlaces for model types whose visual tokens st3 cannot place."""
    if model_type not in KNOWN:
        raise UnknownPlaces(
            f"where the visual tokens of {model_type!r} models lie in the image is not known to "
            f"st3 (known: {', '.join(sorted(KNOWN))})"
        )


def image_tiles(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[Tile]:
    """The tiles of all images of a prompt, which become its ``n_tokens`` image tokens.

    Raises:
        UnknownPlaces: an unknown model type, or inputs that do not fit what is known of it.
    """
    kind = model.config.model_type
    check_known(kind)
    try:
        return _reader(model)(model, inputs, n_tokens)
    except (KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        raise UnknownPlaces(f"the pixel input of this {kind!r} model is not understood") from error


Reader = Callable[[Any, Mapping[str, Any], int], list[Tile]]


def _reader(model: Any) -> Reader:
    kind = model.config.model_type
    if kind in ANYRES:
        return _anyres
    if kind in GRIDS | READING_GRIDS:
        return _grids
    if kind in POSITIONED:
        return _positioned
    if kind in PIXTRAL or getattr(model.config.vision_config, "model_type", "") == "pixtral":
        return _pixtral
    return _squares


def _squares(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[Tile]:
    pixels = inputs["pixel_values"].flatten(0, -4)
    side = math.isqrt(n_tokens // len(pixels))
    if side < 1 or side * side * len(pixels) != n_tokens:
        raise UnknownPlaces(
            f"{n_tokens} visual tokens are not a square grid on each of {len(pixels)} tiles"
        )
    return [Tile(tile, side, side) for tile in pixels]


def _anyres(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[Tile]:
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    counts = tile_counts(model, inputs)
    pixels = inputs["pixel_values"]
    per_image = (
        [image[:count] for image, count in zip(pixels, counts, strict=True)]
        if pixels.dim() == 5
        else pixels.split(counts)
    )
    return [Tile(tile, side, side) for image in per_image for tile in image]


def tile_counts(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Tiles of each image of a model of ``ANYRES``, the whole image included."""
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


def pack(model: Any, inputs: Mapping[str, Any], boxes: Tensor) -> Tensor:
    """The boxes of all tokens of a model of ``ANYRES``, in the prompt's order: the model's own
    packing (cropping, newline tokens, shrinking) run on boxes in place of features.

    Args:
        boxes: [tiles, tokens of a tile, 4].

    Returns:
        [tokens, 4]; newline tokens are NaN.
    """
    inner = model.model
    options: dict[str, Any] = {"image_newline": torch.full((4,), torch.nan)}
    if model.config.model_type == "llava_onevision":
        options["vision_aspect_ratio"] = (
            inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        )
    else:
        # Only ever compared with "default", to warn of features of the wrong size.
        options["vision_feature_select_strategy"] = "full"
    features = list(boxes.float().split(tile_counts(model, inputs)))
    packed, _ = inner.pack_image_features(features, inputs["image_sizes"].cpu(), **options)
    return torch.cat(list(packed))


def framed(model: Any, tile: Tile, boxes: Tensor) -> Tensor:
    """The boxes [rows * columns, 4] of a tile's tokens, with NaN for those that a model puts
    before, between and after its rows and counts as visual."""
    if model.config.model_type != "hunyuan_vl":
        return boxes
    nowhere = torch.full((1, 4), torch.nan)
    rows = boxes.view(tile.rows, tile.columns, 4)
    ended = torch.cat([rows, nowhere.expand(tile.rows, 1, 4)], dim=1)
    return torch.cat([nowhere, ended.flatten(0, 1), nowhere])


def _grids(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[Tile]:
    return _flat_tiles(
        model, inputs["pixel_values"], inputs["image_grid_thw"], inputs.get("image_merge_sizes")
    )


def _flat_tiles(
    model: Any, patches: Tensor, grids: Tensor, merges: Sequence[int] | Tensor | None = None
) -> list[Tile]:
    """Flat patches [n, ...] of all pictures, as one tile for each moment of each of them."""
    vision = model.config.vision_config
    size = vision.patch_size
    common = _merge_size(vision) if merges is None else 0
    tiles, start = [], 0
    for number, (moments, high, wide) in enumerate(grids.tolist()):
        merge = int(merges[number]) if merges is not None else common
        for _ in range(moments):
            flat = patches[start : start + high * wide]
            start += high * wide
            if model.config.model_type in READING_GRIDS:
                cells = flat.reshape(high, wide, 3, -1, size, size)[:, :, :, 0]
                pixels = cells.permute(2, 0, 3, 1, 4)
            else:
                cells = flat.reshape(high // merge, wide // merge, merge, merge, 3, -1, size, size)[
                    :, :, :, :, :, 0
                ]
                pixels = cells.permute(4, 0, 2, 5, 1, 3, 6)
            pixels = pixels.reshape(3, high * size, wide * size)
            tiles.append(Tile(pixels, high // merge, wide // merge))
    return tiles


def _merge_size(vision: Any) -> int:
    """Patches to a token and side, as the vision config calls it."""
    for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"):
        size = getattr(vision, name, None)
        if size is not None:
            return int(size if isinstance(size, int) else size[0])
    raise UnknownPlaces("how many patches become one token is not known")


def _pixtral(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[Tile]:
    config = model.config
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return [
        Tile(image[:, :high, :wide], high // cell, wide // cell)
        for image, (high, wide) in zip(
            inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True
        )
    ]


def _positioned(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[Tile]:
    vision = model.config.vision_config
    pool = vision.pooling_kernel_size if model.config.model_type == "gemma4" else 1
    tiles = []
    for patches, places in zip(inputs["pixel_values"], inputs["image_position_ids"], strict=True):
        there = places[:, 0] >= 0
        x, y = places[there].unbind(1)
        wide, high = int(x.max()) + 1, int(y.max()) + 1
        side = math.isqrt(patches.shape[1] // 3)
        pixels = patches.new_zeros(high, wide, side, side, 3)
        pixels[y, x] = patches[there].reshape(-1, side, side, 3)
        pixels = pixels.permute(4, 0, 2, 1, 3).reshape(3, high * side, wide * side)
        tiles.append(Tile(pixels, high // pool, wide // pool))
    return tiles


def video_rasters(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> list[tuple[int, int]]:
    """Rows and columns of the tokens of each frame (or pair of frames that become one) of the
    prompt's videos; tokens of a video behind its last frame (LLaVA-OneVision's newline) are left
    over.

    Raises:
        UnknownPlaces: an unknown model type.
    """
    kind = model.config.model_type
    if kind in GRIDS:
        merge = _merge_size(model.config.vision_config)
        return [
            (high // merge, wide // merge)
            for moments, high, wide in inputs["video_grid_thw"].tolist()
            for _ in range(moments)
        ]
    videos = inputs.get("pixel_values_videos")
    if kind in ("llava_onevision", "llava_next_video") and videos is not None:
        frames = videos.shape[0] * videos.shape[1]
        newlines = len(videos) if kind == "llava_onevision" else 0
        side = math.isqrt((n_tokens - newlines) // frames)
        if side * side * frames + newlines == n_tokens and len(videos) == 1:
            return [(side, side)] * frames
    raise UnknownPlaces(f"where the video tokens of this {kind!r} model lie is not known to st3")
