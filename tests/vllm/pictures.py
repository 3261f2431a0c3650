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
