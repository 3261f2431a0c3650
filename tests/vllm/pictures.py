"""Requests of the tests."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.vllm.checkpoints import KINDS
from tests.vllm.engine import Ask


def picture(seed: int, width: int = 120, height: int = 96) -> Image.Image:
    """Coloured squares, smoothed."""
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3))
    small = Image.fromarray(noise.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def asks(kind: str) -> list[Ask]:
    """Requests with one image, none, two of other sizes, and one at the start."""
    image = KINDS[kind].image
    return [
        Ask(f"w40 w41 {image} w50 w51 w52", [picture(1)]),
        Ask("w30 w31 w32 w33"),
        Ask(f"w44 {image} w70 w71 {image} w72", [picture(2, 96, 160), picture(3)]),
        Ask(f"{image} w90 w91 w92 w93 w94", [picture(4, 160, 96)]),
    ]


def video(seed: int, frames: int = 4) -> np.ndarray:
    """Pictures that change little from one to the next."""
    first, last = (np.asarray(picture(seed + i, 96, 96), dtype=float) for i in (0, 100))
    shares = np.linspace(0, 1, frames)
    return np.stack([(first * (1 - t) + last * t).astype(np.uint8) for t in shares])


def asks_with_video(kind: str) -> list[Ask]:
    """Requests with a video, and with a video and an image, of the families that take any."""
    word, image = KINDS[kind].video, KINDS[kind].image
    if word is None:
        return []
    return [
        Ask(f"w40 {word} w50 w51", videos=[video(5)]),
        Ask(f"w41 {image} w42 {word} w52", [picture(6)], [video(7, 6)]),
    ]
