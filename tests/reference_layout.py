"""Where the tokens of images and videos lie, as the reference sees it."""

from __future__ import annotations

import math
from typing import Any

from tests.zoo import Family

# What an image of so many tokens is in families whose images are no squares: (rows, columns).
# Mistral's rows of patches stand between break tokens, so that each is an image of its own; tiles
# with newline tokens are no grid.
_ROWS = {count: (1, count) for count in range(1, 64)}
SHAPES: dict[str, dict[int, tuple[int, int]]] = {
    **dict.fromkeys(("mistral3", "mistral3_window", "pixtral"), _ROWS),
    **{name: {12: (3, 4)} for name in ("gemma4", "gemma4_moe", "gemma4_per_layer")},
    **{name: {} for name in ("llava_next", "llava_onevision", "llava_next_video")},
}


class Layout(list[list[list[int]]]):
    """For each row the positions of each image's tokens.

    Attributes:
        shapes: (rows, columns) by the number of tokens, for models that say it of each image.
        clips: frames by the number of tokens, of videos.
    """

    shapes: dict[int, tuple[int, int]] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.clips: dict[int, int] = {}


def frames_of(image: list[int], layout: Layout) -> int:
    """The frames of a video; 1 of an image."""
    return layout.clips.get(len(image), 1)


def shape_of(image: list[int], layout: Layout) -> tuple[int, int] | None:
    """The grid of an image's tokens: what the batch says, or a square; None if it has none."""
    if layout.shapes is not None:
        return layout.shapes.get(len(image) // frames_of(image, layout))
    side = math.isqrt(len(image))
    return (side, side) if side * side == len(image) else None


def image_rows(family: Family, model: Any, batch: Any) -> Layout:
    """For each row the positions of each image's tokens: runs of visual tokens, cut where two
    images touch, as the engine sees them."""
    rows = Layout()
    if "image_grid_thw" in batch:
        sides = batch["image_grid_thw"][:, 1:] // model.config.vision_config.spatial_merge_size
        rows.shapes = {high * wide: (high, wide) for high, wide in sides.tolist()}
    elif "video_grid_thw" in batch:
        merge = model.config.vision_config.spatial_merge_size
        rows.shapes = {}
        for frames, high, wide in batch["video_grid_thw"].tolist():
            shape = (high // merge, wide // merge)
            rows.shapes[math.prod(shape)] = shape
            rows.clips[frames * math.prod(shape)] = frames
    elif family.name in SHAPES:
        rows.shapes = SHAPES[family.name]
    visual, spans = family.visual_mask(model, batch), family.visual_spans(model, batch)
    for mask, row_spans in zip(visual, spans, strict=True):
        starts = {start for start, _ in row_spans}
        found: list[list[int]] = []
        for place in mask.nonzero().flatten().tolist():
            if found and found[-1][-1] == place - 1 and place not in starts:
                found[-1].append(place)
            else:
                found.append([place])
        rows.append(found)
    return rows
