"""Scenes: what is in an image, and how it is drawn (96 x 96 pixels, 3 x 3 cells)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.world import BACKGROUNDS, DIGITS, EMOJI, INKS, LETTERS, RGB

IMAGE_SIZE = 96
CELL = IMAGE_SIZE // 3
FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_SIZE = 109  # the only size at which the font's bitmaps exist
SIZE_RANGES = {"small": (16, 20), "large": (26, 31)}  # pixels of the longer side
# Seeds from here on are never trained on.
HELD_OUT = 10**9


@dataclass(frozen=True)
class Thing:
    """One object: ``cell`` counts 0..8 in reading order, lengths are in pixels."""

    name: str
    cell: int
    size: int
    dx: int
    dy: int
    angle: float
    colour: str | None = None  # of a letter or digit; None for an emoji

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def kind(self) -> str:
        if self.name in EMOJI:
            return "emoji"
        return "digit" if self.name in DIGITS else "letter"

    @property
    def size_word(self) -> str:
        return "small" if self.size <= SIZE_RANGES["small"][1] else "large"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, each name at most once, on a coloured background."""

    things: tuple[Thing, ...]
    background: str
    shade: RGB  # the background's colour
    gradient: RGB  # what is added to it from the top edge to the bottom edge
    noise: int  # amplitude of the pixel noise
    seed: int

    @property
    def names(self) -> list[str]:
        return [thing.name for thing in self.things]

    def at(self, cell: int) -> Thing | None:
        return next((thing for thing in self.things if thing.cell == cell), None)

    def find(self, name: str) -> Thing | None:
        return next((thing for thing in self.things if thing.name == name), None)


def sample_scene(seed: int, count: int | None = None, include: tuple[str, ...] = ()) -> Scene:
    """A random scene of ``count`` (3 to 9 if None) objects, the same for the same seed.

    Half of the scenes hold one digit, half hold one letter.  ``include`` names objects
    that must appear (at most as many as fit).
    """
    rng = random.Random(seed)
    count = rng.randint(3, 9) if count is None else count
    if not 1 <= count <= 9:
        raise ValueError(f"count must be 1 to 9 (one object per cell), got {count}")
    names = list(include)[:count]
    for choices in (DIGITS, LETTERS):
        if rng.random() < 0.5 and len(names) < count and not set(choices) & set(names):
            names.append(rng.choice(choices))
    names += rng.sample([name for name in EMOJI if name not in names], count - len(names))
    rng.shuffle(names)
    cells = sorted(rng.sample(range(9), count))
    background = rng.choice(list(BACKGROUNDS))
    things = tuple(_sample_thing(rng, *pair, background) for pair in zip(names, cells, strict=True))
    return Scene(
        things=things,
        background=background,
        shade=_shift(rng, BACKGROUNDS[background], 7),
        gradient=_shift(rng, (0, 0, 0), 20),
        noise=rng.choice((0, 4, 8)),
        seed=seed,
    )


def sample_drill(seed: int) -> Scene:
    """A full scene with six digits and letters, for the cells' loss alone.

    Ordinary scenes hold one digit and one letter at most, too few to learn their shapes from.
    """
    return sample_scene(seed, 9, tuple(random.Random(seed).sample((*DIGITS, *LETTERS), 6)))


def _sample_thing(rng: random.Random, name: str, cell: int, background: str) -> Thing:
    size = rng.randint(*SIZE_RANGES[rng.choice(list(SIZE_RANGES))])
    room = (CELL - size) // 2
    colour = None
    if name not in EMOJI:
        colour = rng.choice([ink for ink in INKS if ink != background])
    return Thing(
        name=name,
        cell=cell,
        size=size,
        dx=rng.randint(-room, room),
        dy=rng.randint(-room, room),
        angle=rng.uniform(-12, 12),
        colour=colour,
    )


def _shift(rng: random.Random, colour: RGB, amount: int) -> RGB:
    red, green, blue = (channel + rng.randint(-amount, amount) for channel in colour)
    return red, green, blue


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 96 x 96 pixels; the same pixels for the same scene."""
    ramp = np.linspace(0, 1, IMAGE_SIZE, dtype=np.float32)[:, None, None]
    pixels = np.asarray(scene.shade, np.float32) + ramp * np.asarray(scene.gradient, np.float32)
    pixels = np.broadcast_to(pixels, (IMAGE_SIZE, IMAGE_SIZE, 3))
    if scene.noise:
        noise = np.random.default_rng(scene.seed).uniform(-1, 1, (IMAGE_SIZE, IMAGE_SIZE, 1))
        pixels = pixels + scene.noise * noise.astype(np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")
    for thing in scene.things:
        sprite = _scaled(thing.name, thing.colour, thing.size)
        sprite = sprite.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
        x = thing.column * CELL + CELL // 2 + thing.dx - sprite.width // 2
        y = thing.row * CELL + CELL // 2 + thing.dy - sprite.height // 2
        image.paste(sprite, (x, y), sprite)
    return image


@lru_cache(maxsize=8192)
def _scaled(name: str, colour: str | None, size: int) -> Image.Image:
    sprite = _sprite(name, colour)
    scale = size / max(sprite.size)
    width, height = (max(1, round(side * scale)) for side in sprite.size)
    return sprite.resize((width, height), Image.Resampling.LANCZOS)


@cache
def _sprite(name: str, colour: str | None) -> Image.Image:
    """The object cut out, transparent around it, at full resolution."""
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    image = Image.new("RGBA", (180, 180), (0, 0, 0, 0))
    if name in EMOJI:
        if not FONT_FILE.exists():
            raise FileNotFoundError(
                f"{FONT_FILE} is missing: drawing needs it (Debian: apt install "
                "fonts-noto-color-emoji)"
            )
        font = ImageFont.truetype(str(FONT_FILE), EMOJI_SIZE)
        ImageDraw.Draw(image).text((10, 10), EMOJI[name], font=font, embedded_color=True)
    else:
        font = ImageFont.load_default(120)  # Pillow's own scalable font
        ink = INKS[colour or "black"]
        ImageDraw.Draw(image).text(
            (30, 10), name.upper(), font=font, fill=ink, stroke_width=5, stroke_fill=ink
        )
    box = image.getbbox()
    if box is None:
        raise RuntimeError(f"the font {FONT_FILE} has no picture for {name!r}")
    return image.crop(box)
