"""How much a prompt takes before a model sees it: positions, and bytes to prepare its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Bytes at the peak, measured with transformers 5.24's Pillow processors on images of 0.2 to 60
# million pixels: of a decoded pixel (Pillow's four bytes, a copy, arrays), of a pixel after
# resizing, and of one that remains after cropping (float32, normalised, cut into patches).
DECODED, RESIZED, KEPT = 16, 12, 48

_A_PIXEL_COUNT = 10_000
"""Edges in a processor's `size` from here on are pixel counts, as Qwen2-VL's."""


def positions(model: Any) -> int | None:
    """Positions of the model's decoder, or None where its config does not say."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def image_bytes(image_processor: Any, sizes: Iterable[tuple[int, int]]) -> int:
    """About the bytes that decoding and processing images takes at the peak.

    It is told from their headers, before anything is decoded. What grows without bound is the
    point: a processor that scales the short side to 336 makes 336 x 67,200 pixels of 1 x 200.

    Args:
        image_processor: of transformers.
        sizes: (width, height) of each image.
    """
    total = 0
    for width, height in sizes:
        resized, kept = _resized(image_processor, width, height)
        total += DECODED * width * height + RESIZED * resized + KEPT * kept
    return total


def _resized(processor: Any, width: int, height: int) -> tuple[int, int]:
    """Pixels after resizing, and those of them that are kept."""
    pixels = width * height
    size = _size(getattr(processor, "size", None))
    if not size or getattr(processor, "do_resize", True) is False:
        return pixels, pixels
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    if "height" in size and "width" in size:
        resized = size["height"] * size["width"]
    elif long and (long >= _A_PIXEL_COUNT or (short or 0) >= _A_PIXEL_COUNT):
        resized = min(max(pixels, short or 0), long)
    elif long:
        resized = int(pixels * (long / max(width, height)) ** 2)
    elif short:
        resized = int(pixels * (short / min(width, height)) ** 2)
    else:
        resized = pixels
    crop = _size(getattr(processor, "crop_size", None))
    if getattr(processor, "do_center_crop", False) and "height" in crop and "width" in crop:
        return resized, min(resized, crop["height"] * crop["width"])
    return resized, resized


def _size(given: Any) -> dict[str, int]:
    """The entries of a processor's size that are set."""
    if isinstance(given, int):
        return {"height": given, "width": given}
    entries = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    return {name: value for name, value in entries.items() if isinstance(value, int)}
