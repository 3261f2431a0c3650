"""Pictures of what was kept: the image, and beside it the patches that some layers still see.

A visual token is mapped to the rectangle of the image that it stands for. The mapping is known for
models whose visual tokens are one square grid over each image (`GRID_MODELS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

Box = tuple[float, float, float, float]

GRID_MODELS = ("llava", "paligemma", "gemma3")
"""`config.model_type` of the models whose visual tokens are one square grid over each image."""

PANEL = 300  # longest side of a panel, pixels
GAP = 16
CAPTION = 26
EDGE = (230, 159, 0)  # Okabe and Ito's orange, which colour-blind readers tell from any grey
INK = (20, 20, 20)


def check_supported(model_type: str) -> None:
    """Raise ValueError when the places of this model type's visual tokens are not known."""
    if model_type not in GRID_MODELS:
        raise ValueError(
            f"no heat map for {model_type!r} models: how their visual tokens map to places in the "
            f"image is not known to st3 (known: {', '.join(GRID_MODELS)}). Leave the heat map out."
        )


def grid_side(n_visual: int) -> int:
    """Side of the square grid that an image's `n_visual` tokens form.

    Raises ValueError when they form none, as with tiled images or extra separator tokens.
    """
    side = math.isqrt(n_visual)
    if n_visual < 1 or side * side != n_visual:
        raise ValueError(
            f"no heat map: the image has {n_visual} visual tokens, which is not a square grid"
        )
    return side


def split_evenly(n_visual: int, images: int) -> list[int]:
    """Visual tokens of each image of a prompt; in models of `GRID_MODELS` all have the same number.

    Raises ValueError when they cannot have.
    """
    if images < 1 or n_visual % images:
        raise ValueError(f"no heat map: {n_visual} visual tokens do not split over {images} images")
    return [n_visual // images] * images


def seen_box(size: tuple[int, int], image_processor: Any) -> Box:
    """The part of an image that the model sees, as (left, top, right, bottom) in its own pixels.

    size: (width, height) of the image. image_processor: the transformers image processor, of which
    `do_resize`, `size`, `do_center_crop` and `crop_size` are read. With a centre crop the margins
    are never seen; padding is not handled, because no model of `GRID_MODELS` pads.
    """
    width, height = size
    if not getattr(image_processor, "do_center_crop", False):
        return (0.0, 0.0, float(width), float(height))
    crop = _as_dict(image_processor.crop_size)
    scale_x = scale_y = 1.0
    if getattr(image_processor, "do_resize", True):
        target = _as_dict(image_processor.size)
        if target.get("shortest_edge"):
            scale_x = scale_y = target["shortest_edge"] / min(width, height)
        else:
            scale_x, scale_y = target["width"] / width, target["height"] / height
    seen_width = min(width, crop["width"] / scale_x)
    seen_height = min(height, crop["height"] / scale_y)
    left, top = (width - seen_width) / 2, (height - seen_height) / 2
    return (left, top, left + seen_width, top + seen_height)


def choose_layers(kept: Sequence[int], count: int = 4) -> list[int]:
    """At most `count` layers that tell the story: the first layer with fewer tokens, ..., the last.

    kept: visual tokens that each layer keeps. Only layers at which the number changes are taken;
    if it never changes, the last layer alone.
    """
    if not kept:
        raise ValueError(
            "no heat map: the report has no layers (was there an image in the prompt?)"
        )
    changes = [i for i in range(1, len(kept)) if kept[i] != kept[i - 1]]
    if len(changes) <= count:
        return changes or [len(kept) - 1]
    picks = (
        {round(i * (len(changes) - 1) / (count - 1)) for i in range(count)} if count > 1 else {-1}
    )
    return [changes[i] for i in sorted(picks)]


def draw(
    images: Sequence[Image.Image],
    boxes: Sequence[Box],
    visual_per_image: Sequence[int],
    kept_positions: Mapping[int, Sequence[int]],
    title: str = "",
) -> Image.Image:
    """A row for each image: the image, then a panel for each layer with dropped patches dimmed.

    images: as given to the model, in the prompt's order. boxes: their `seen_box`.
    visual_per_image: visual tokens of each image. kept_positions: for each layer to draw (counted
    from 0) the kept tokens, as indices into the row's visual tokens (all images one after another).
    Raises ValueError when the lengths disagree or an image's tokens are not a square grid.
    """
    if not len(images) == len(boxes) == len(visual_per_image):
        raise ValueError(
            f"no heat map: {len(images)} images, {len(boxes)} boxes and visual token counts for "
            f"{len(visual_per_image)} images do not belong together"
        )
    rows = []
    start = 0
    for number, (image, box, n_visual) in enumerate(
        zip(images, boxes, visual_per_image, strict=True)
    ):
        side = grid_side(n_visual)
        name = "image" if len(images) == 1 else f"image {number + 1}"
        panel, box = _fit(image.convert("RGB"), box)
        panels = [_captioned(panel, f"{name}: {n_visual} visual tokens")]
        for layer, positions in kept_positions.items():
            own = {p - start for p in positions if start <= p < start + n_visual}
            caption = f"layer {layer}: {len(own)}/{n_visual} kept"
            panels.append(_captioned(_dimmed(panel, box, side, own), caption))
        rows.append(_beside(panels))
        start += n_visual
    return _stacked(rows, title)


def _as_dict(size: Any) -> dict[str, float]:
    return {k: v for k, v in dict(size).items() if v}


def _fit(image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    scale = PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    left, top, right, bottom = (value * scale for value in box)
    return image.resize(size, resample), (left, top, right, bottom)


def _dimmed(panel: Image.Image, box: Box, side: int, kept: set[int]) -> Image.Image:
    left, top, right, bottom = box

    def corner(row: int, column: int) -> tuple[int, int]:
        x, y = left + (right - left) * column / side, top + (bottom - top) * row / side
        return round(x), round(y)

    mask = Image.new("L", panel.size, 0)
    fill = ImageDraw.Draw(mask)
    for index in kept:
        (x0, y0), (x1, y1) = (
            corner(*divmod(index, side)),
            corner(index // side + 1, index % side + 1),
        )
        fill.rectangle((x0, y0, x1 - 1, y1 - 1), fill=255)
    grey = ImageEnhance.Color(panel).enhance(0.15)
    out = Image.composite(
        panel, Image.blend(grey, Image.new("RGB", panel.size, (60, 60, 60)), 0.75), mask
    )

    line = ImageDraw.Draw(out)
    for index in kept:  # the outline shows kept patches even where the image itself is dark
        row, column = divmod(index, side)
        sides = [
            (row > 0 and index - side in kept, (row, column), (row, column + 1)),
            (row + 1 < side and index + side in kept, (row + 1, column), (row + 1, column + 1)),
            (column > 0 and index - 1 in kept, (row, column), (row + 1, column)),
            (column + 1 < side and index + 1 in kept, (row, column + 1), (row + 1, column + 1)),
        ]
        for neighbour_kept, a, b in sides:
            if not neighbour_kept:
                line.line([corner(*a), corner(*b)], fill=EDGE, width=2)
    return out


def _captioned(panel: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(size=14)
    width = max(panel.width, math.ceil(font.getlength(caption)))
    out = Image.new("RGB", (width, panel.height + CAPTION), "white")
    ImageDraw.Draw(out).text((0, 3), caption, fill=INK, font=font)
    out.paste(panel, (0, CAPTION))
    return out


def _beside(panels: Sequence[Image.Image]) -> Image.Image:
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    out = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    x = 0
    for panel in panels:
        out.paste(panel, (x, 0))
        x += panel.width + GAP
    return out


def _stacked(rows: Sequence[Image.Image], title: str) -> Image.Image:
    font = ImageFont.load_default(size=16)
    head = CAPTION + GAP // 2 if title else 0
    width = max([row.width for row in rows] + [math.ceil(font.getlength(title))])
    height = head + sum(row.height for row in rows) + GAP * (len(rows) - 1)
    out = Image.new("RGB", (width + 2 * GAP, height + 2 * GAP), "white")
    if title:
        ImageDraw.Draw(out).text((GAP, GAP), title, fill=INK, font=font)
    y = GAP + head
    for row in rows:
        out.paste(row, (GAP, y))
        y += row.height + GAP
    return out
