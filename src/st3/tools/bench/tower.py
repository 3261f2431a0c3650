"""The vision tower of a model, on random pixels that give about the wanted visual tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from st3.cost import VisionDims
from st3.tools.bench.clock import Marks

_ONE_CROP = ("llava", "internvl", "gemma3")  # pixel_values [crops, 3, size, size]
_CROPS_OF_A_ROW = ("smolvlm", "idefics3")  # [B, crops, 3, size, size]
_NATIVE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # patches of all images, and their grids


def tower(model: Any, visual: int, batch: int) -> Callable[[], float] | None:
    """A function that runs the tower for ``batch`` rows of ``visual`` tokens and gives the seconds
    it took; None for families whose tower is not described here."""
    inputs = vision_inputs(model, visual, batch)
    if inputs is None:
        return None

    @torch.no_grad()
    def run() -> float:
        marks = Marks(model.device)
        marks.mark()
        model.get_image_features(**inputs)
        marks.mark()
        return marks.seconds()[0]

    return run


def vision_inputs(model: Any, visual: int, batch: int) -> dict[str, Any] | None:
    """Arguments of ``get_image_features``."""
    kind = model.config.model_type
    if kind in _NATIVE:
        return _native(model, visual, batch)
    if kind not in (*_ONE_CROP, *_CROPS_OF_A_ROW, "llava_next"):
        return None
    dims = VisionDims.from_config(model.config)
    if dims.crop_patches is None:
        return None
    crops = math.ceil(visual / (dims.crop_patches / dims.patches_per_token))
    side = _side(model.config.vision_config.image_size)
    if kind in _ONE_CROP:
        return {"pixel_values": _pixels(model, batch * crops, 3, side, side)}
    inputs: dict[str, Any] = {"pixel_values": _pixels(model, batch, crops, 3, side, side)}
    if kind == "llava_next":
        size = _image_size(model.config.image_grid_pinpoints, side, crops)
        if size is None:
            return None
        inputs["image_sizes"] = torch.tensor([size] * batch, device=model.device)
    return inputs


def _native(model: Any, visual: int, batch: int) -> dict[str, Any]:
    """One image for each row, as square as its number of tokens allows."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    high = max(n for n in range(1, math.isqrt(visual) + 1) if visual % n == 0)
    grid = [1, high * merge, visual // high * merge]
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": _pixels(model, batch * math.prod(grid), patch),
        "image_grid_thw": torch.tensor([grid] * batch, device=model.device),
    }


def _image_size(pinpoints: list[list[int]], side: int, crops: int) -> list[int] | None:
    """An image size that LLaVA-NeXT cuts into ``crops`` crops, the overview among them."""
    for height, width in pinpoints:
        if (height // side) * (width // side) + 1 == crops:
            return [height, width]
    return None


def _side(size: Any) -> int:
    return int(size[0]) if isinstance(size, (list, tuple)) else int(size)


def _pixels(model: Any, *shape: int) -> torch.Tensor:
    return torch.rand(shape, device=model.device, dtype=torch.float32).to(model.dtype)
