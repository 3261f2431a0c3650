"""The LLaVA group: a CLIP-like tower, a projector of two layers, any decoder."""

from __future__ import annotations

from typing import Any

from st3.cost.vision import VisionDims
from st3.models.base import Family
from st3.models.layouts import Squares, SquaresOrPixtral
from st3.models.tiled import AnyRes
from st3.models.towers import two_linear
from st3.models.ways import Packed, Way


class Llava(Family):
    def project(self, tower: VisionDims, config: Any) -> VisionDims:
        return two_linear(tower, config)


FAMILIES = (
    Llava(
        "llava",
        "LLaVA 1.5, Pixtral (transformers layout)",
        layout=SquaresOrPixtral(),
        way=Way(),
    ),
    Llava(
        "llava_next",
        "LLaVA-NeXT (1.6)",
        "tiles and newline tokens are visual tokens",
        layout=AnyRes(),
        way=Packed(),
    ),
    Llava(
        "llava_onevision",
        "LLaVA-OneVision",
        video=True,
        layout=AnyRes(newlines=1, aspect=True),
        way=Packed(),
    ),
    Llava("llava_next_video", "LLaVA-NeXT-Video", video=True, layout=AnyRes(), way=Packed()),
    Family("vipllava", "ViP-LLaVA", layout=Squares(), way=Way()),
    Family("video_llava", "Video-LLaVA", layout=Squares(placed=False)),
    Family("fast_vlm", "FastVLM", layout=Squares(placed=False)),
)
