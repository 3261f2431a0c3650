"""What a vision tower attends to, per visual token, from full attention maps of all its layers."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from tests.zoo import Family

NAME = "tower_reference"
CLASS_TOKEN = ("clip_vision_model", "internvl_vision")
_maps: dict[int, list[Tensor]] = {}  # by attention module, of each of its calls


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The tower's own eager attention, whose map is kept."""
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key).double() * kwargs["scaling"]
    if attention_mask is not None:
        logits = logits + attention_mask
    _maps.setdefault(id(module), []).append(logits.softmax(-1))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def tower_weights(model: Any, batch: Any, family: Family, look: Any) -> Tensor:
    """[B, T]: the attention that each visual token's patches get in the layer that ``look`` means,
    from the class token or from all of the tower's tokens."""
    inner, config = model.model, model.config
    tower = next(
        module for name in ("vision_tower", "visual", "vision_model")
        if (module := getattr(inner, name, None)) is not None
    )  # fmt: skip
    maps = _maps_of(model, tower, batch)
    vision = config.vision_config
    first = vision.model_type in CLASS_TOKEN
    if look.depth is None:
        index = len(maps) - 1
        name = "vision_feature_layer"  # ViP-LLaVA's is in the plural on transformers 5.17
        chosen = getattr(config, name, getattr(config, f"{name}s", None))
        if chosen is not None:
            chosen = chosen if isinstance(chosen, int) else chosen[-1]
            index = len(maps) + chosen if chosen < 0 else chosen - 1
    else:
        index = max(0, round(look.depth * len(maps)) - 1)
    if look.of == "class" and first:
        images = [row[0, 1:] for call in maps[index] for row in call.mean(1)]
    else:
        images = [_received(row)[int(first) :] for call in maps[index] for row in call]
    visual = family.visual_mask(model, batch)
    weights = torch.zeros(visual.shape, dtype=torch.double)
    weights[visual] = torch.cat(_tokens(model, batch, images))
    return weights.float()


def _received(row: Tensor) -> Tensor:
    """[heads, Q, K] -> [K]: the mean over the heads and over the queries that see a key."""
    return row.mean(0).sum(0) / (row[0] > 0).sum(0)


def _maps_of(model: Any, tower: Any, batch: Any) -> list[list[Tensor]]:
    """For each layer of the tower the maps of its calls, [images, heads, Q, K]."""
    layers = max(
        (list(m) for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and _own(m[0])),
        key=len,
    )
    before = tower.config._attn_implementation
    tower.config._attn_implementation = NAME
    _maps.clear()
    with torch.no_grad():
        model(**batch)
    tower.config._attn_implementation = before
    return [_maps[id(_own(layer))] for layer in layers]


def _own(layer: Any) -> Any:
    return next((getattr(layer, name) for name in ("self_attn", "attention", "attn")
                 if hasattr(layer, name)), None)  # fmt: skip


def _tokens(model: Any, batch: Any, images: list[Tensor]) -> list[Tensor]:
    """From the patches of each image, or part of one, to visual tokens."""
    inner, config = model.model, model.config
    if hasattr(inner, "pack_image_features"):
        return packed(inner, batch, images)
    if hasattr(inner, "pixel_shuffle"):
        side = math.isqrt(len(images[0]))
        number = torch.arange(side * side).float().view(1, side, side, 1)
        joined = inner.pixel_shuffle(number, scale_factor=config.downsample_ratio)
        return [image[joined.flatten(0, 2).long()].mean(-1) for image in images]
    if "image_grid_thw" in batch:
        return [_read(torch.cat(images), batch["image_grid_thw"].tolist(), config.vision_config)]
    block = getattr(config, "scale_factor", 1)
    if hasattr(config, "mm_tokens_per_image"):
        block = math.isqrt(len(images[0]) // config.mm_tokens_per_image)
    return [_blocks(image, block) for image in images]


def _blocks(image: Tensor, block: int) -> Tensor:
    if block == 1:
        return image
    side = math.isqrt(len(image))
    means = []
    for top in range(0, side, block):
        for left in range(0, side, block):
            cells = [image[(top + y) * side + left + x]
                     for y in range(block) for x in range(block)]  # fmt: skip
            means.append(torch.stack(cells).mean())
    return torch.stack(means)


def _read(patches: Tensor, grids: list[list[int]], vision: Any) -> Tensor:
    """Of Qwen-VL: each token's patches stand together, the tokens perhaps window by window."""
    merge = vision.spatial_merge_size
    tokens = patches.view(-1, merge * merge).mean(1)
    if not vision.model_type.startswith("qwen2_5_vl"):
        return tokens
    side, start, order = vision.window_size // merge // vision.patch_size, 0, []
    for frames, high, wide in grids:
        rows, columns = high // merge, wide // merge
        for frame in range(frames):
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    order += [
                        start + (frame * rows + y) * columns + x
                        for y in range(top, min(rows, top + side))
                        for x in range(left, min(columns, left + side))
                    ]
        start += frames * rows * columns
    read = torch.zeros_like(tokens)
    for place, token in zip(order, tokens, strict=True):
        read[place] = token
    return read


def packed(inner: Any, batch: Any, images: list[Tensor]) -> list[Tensor]:
    """The model's own packing, run on the numbers of the patches where it only moves them."""
    tiles = [1] * len(batch["pixel_values"])
    if batch["pixel_values"].dim() == 5:  # images of several tiles, filled up with empty ones
        tiles = [int(image.flatten(1).any(1).sum()) for image in batch["pixel_values"]]
    patches = torch.stack(images)
    more = {"vision_feature_select_strategy": "default"}
    if hasattr(inner.config, "vision_aspect_ratio"):
        more = {"vision_aspect_ratio": inner.config.vision_aspect_ratio}
    packed, _ = inner.pack_image_features(
        torch.split(patches.float()[..., None], tiles),
        batch["image_sizes"],
        image_newline=torch.zeros(1),
        **more,
    )
    return [p.flatten().double() for p in packed]
