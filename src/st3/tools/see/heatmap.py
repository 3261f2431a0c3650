"""Pictures of what was kept: the image, and beside it the patches that some layers still see; and
an animation of annealing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from st3.models.places import Box, Place

if TYPE_CHECKING:
    from st3.tools.see.record import Run

PANEL = 300  # longest side of a panel, pixels
BESIDE = 3  # panels in a row: on a phone they are still large enough to see a patch
GAP = 16
WORDS = 19  # size of the letters
CAPTION = 32
EDGE = (230, 159, 0)  # Okabe and Ito's orange, which colour-blind readers tell from any grey
INK = (20, 20, 20)


def choose_layers(kept: Sequence[int], count: int = 4, whole: int | None = None) -> list[int]:
    """Layers that tell the story: the first with fewer tokens, ..., the last. Only layers at which
    the number changes are taken; if it never changes, the last layer alone.

    Args:
        kept: visual tokens that each layer keeps.
        count: the most to choose.
        whole: those of the prompt; None: as many as the first layer keeps.
    """
    if not kept:
        raise ValueError(
            "no heat map: the report has no layers (was there an image in the prompt?)"
        )
    before = [kept[0] if whole is None else whole, *kept]
    changes = [i for i in range(len(kept)) if kept[i] != before[i]]
    if len(changes) <= count:
        return changes or [len(kept) - 1]
    picks = (
        {round(i * (len(changes) - 1) / (count - 1)) for i in range(count)} if count > 1 else {-1}
    )
    return [changes[i] for i in sorted(picks)]


def draw(
    images: Sequence[Image.Image],
    places: Sequence[Place],
    kept_positions: Mapping[int, Sequence[int]],
    title: str = "",
) -> Image.Image:
    """For each image: the image, then a panel for each layer with dropped patches dimmed.

    Args:
        images: as given to the model, in the prompt's order.
        places: where each visual token lies in them.
        kept_positions: for each layer to draw (counted from 0) the kept tokens, as indices into the
            row's visual tokens (all images one after another).
        title: above all; may be empty.

    Raises:
        ValueError: places or positions speak of images or tokens that are not there.
    """
    if any(place.picture >= len(images) for place in places):
        raise ValueError(
            f"no heat map: {len(images)} images, but visual tokens that lie in image "
            f"{max(place.picture for place in places) + 1}"
        )
    if any(p >= len(places) for positions in kept_positions.values() for p in positions):
        raise ValueError(f"no heat map: places of {len(places)} visual tokens, but more were kept")
    rows = []
    for number, image in enumerate(images):
        own = {i for i, place in enumerate(places) if place.picture == number}
        name = "image" if len(images) == 1 else f"image {number + 1}"
        panel = fit(image.convert("RGB"))
        panels = [_captioned(panel, f"{name}: {len(own)} visual tokens")]
        for layer, positions in kept_positions.items():
            kept = own.intersection(positions)
            boxes = [box for i in sorted(kept) if (box := places[i].box) is not None]
            caption = f"layer {layer} sees {len(kept)} of {len(own)}"
            panels.append(_captioned(dimmed(panel, boxes), caption))
        rows += [_beside(panels[i : i + BESIDE]) for i in range(0, len(panels), BESIDE)]
    return _stacked(rows, title)


def animate(run: Run, frames: int = 60, picture: int = 0) -> list[Image.Image]:
    """Annealing as a sequence of pictures: what the decoder layers still see of one image while the
    answer grows. A patch is as bright as the share of the layers that see it.

    Args:
        run: a recorded run.
        frames: the most to draw; longer answers are sampled evenly.
        picture: which image of the prompt, from 0.

    Raises:
        ValueError: the places of the visual tokens are not known, or there is no such picture.
    """
    if run.places is None:
        raise ValueError(f"no animation: {run.unplaced}")
    if not 0 <= picture < len(run.pictures):
        raise ValueError(f"no animation: there are {len(run.pictures)} images, counted from 0")
    steps = len(run.visible)
    count = min(frames, steps)
    chosen = [round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)]
    panel = fit(run.pictures[picture])
    whole = run.n_visual * run.layers
    drawn = []
    for step in chosen:
        share = [0.0] * run.n_visual
        for order, visible in zip(run.order, run.visible[step], strict=True):
            for token in order[:visible]:
                share[token] += 1 / run.layers
        lit = [
            (place.box, share[i])
            for i, place in enumerate(run.places)
            if place.picture == picture and place.box is not None
        ]
        seen = sum(run.visible[step]) / whole
        body = _captioned(_lit(panel, lit), f"after {step} tokens: {seen:.0%} visible")
        drawn.append(_stacked([body, _tail("".join(run.tokens[: step + 1]), body.width)], ""))
    high = max(frame.height for frame in drawn)
    return [_padded(frame, high) for frame in drawn]


def save_gif(path: Path, frames: Sequence[Image.Image], seconds: float = 8.0) -> None:
    """Write an endless GIF; its last frame stays for two seconds more.

    Args:
        path: of the file.
        frames: of one size.
        seconds: about so long, for all frames together.

    Raises:
        OSError: the file cannot be written.
    """
    each = max(40, round(1000 * seconds / len(frames)))
    small = [frame.quantize(96, dither=Image.Dither.NONE) for frame in frames]
    durations = [each] * (len(frames) - 1) + [each + 2000]
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0)


def fit(image: Image.Image) -> Image.Image:
    """The image in the size of a panel."""
    scale = PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return image.resize(size, resample)


def _pixels(size: tuple[int, int], box: Box) -> tuple[int, int, int, int]:
    """Corners of a box within a panel, the last row and column included."""
    left, top, right, bottom = box
    x0, y0 = round(left * size[0]), round(top * size[1])
    return (
        x0, y0, max(x0, round(right * size[0]) - 1), max(y0, round(bottom * size[1]) - 1)
    )  # fmt: skip


def _shade(panel: Image.Image) -> Image.Image:
    grey = ImageEnhance.Color(panel).enhance(0.15)
    return Image.blend(grey, Image.new("RGB", panel.size, (60, 60, 60)), 0.75)


def dimmed(panel: Image.Image, kept: Iterable[Box]) -> Image.Image:
    """A panel with all dimmed but some parts, which get an outline.

    Args:
        panel: the picture; it is not changed.
        kept: the parts, in pixels: left, top, right, bottom.
    """
    mask = Image.new("L", panel.size, 0)
    fill = ImageDraw.Draw(mask)
    for box in kept:
        fill.rectangle(_pixels(panel.size, box), fill=255)
    out = Image.composite(panel, _shade(panel), mask)
    # The outline shows kept patches even where the image itself is dark.
    framed = Image.new("L", (panel.width + 4, panel.height + 4), 0)
    framed.paste(mask, (2, 2))
    inner = framed.filter(ImageFilter.MinFilter(5)).crop((2, 2, panel.width + 2, panel.height + 2))
    out.paste(EDGE, (0, 0), ImageChops.subtract(mask, inner))
    return out


def _lit(panel: Image.Image, patches: Iterable[tuple[Box, float]]) -> Image.Image:
    """The panel, each patch as bright as its share; where patches overlap, as the brightest."""
    mask = Image.new("L", panel.size, 0)
    fill = ImageDraw.Draw(mask)
    for box, share in sorted(patches, key=lambda patch: patch[1]):
        fill.rectangle(_pixels(panel.size, box), fill=round(255 * min(share, 1.0)))
    return Image.composite(panel, _shade(panel), mask)


def _tail(text: str, width: int, lines: int = 3) -> Image.Image:
    """The end of a text in a few lines."""
    font = ImageFont.load_default(size=WORDS)
    rows = _wrapped(text, font, width)[-lines:]
    out = Image.new("RGB", (width, 26 * lines), "white")
    pen = ImageDraw.Draw(out)
    for place, row in enumerate(rows):
        pen.text((0, 26 * place), row, fill=INK, font=font)
    return out


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels, where its words allow that."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) > width and rows[-1]:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows


def _captioned(panel: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(size=WORDS)
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
    font = ImageFont.load_default(size=WORDS + 2)
    width = max(row.width for row in rows)
    lines = _wrapped(title, font, width) if title else []
    head = CAPTION * len(lines) + GAP // 2 if title else 0
    height = head + sum(row.height for row in rows) + GAP * (len(rows) - 1)
    out = Image.new("RGB", (width + 2 * GAP, height + 2 * GAP), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(out).text((GAP, GAP + CAPTION * number), line, fill=INK, font=font)
    y = GAP + head
    for row in rows:
        out.paste(row, (GAP, y))
        y += row.height + GAP
    return out


def _padded(frame: Image.Image, height: int) -> Image.Image:
    out = Image.new("RGB", (frame.width, height), "white")
    out.paste(frame, (0, 0))
    return out
