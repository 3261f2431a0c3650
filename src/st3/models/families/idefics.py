"""Idefics and SmolVLM: tiles stand between marker tokens."""

from __future__ import annotations

from typing import Any

from st3.cost.vision import VisionDims
from st3.models.base import Family
from st3.models.layouts import Squares
from st3.models.towers import shuffled
from st3.models.ways import Blocks


class Idefics(Family):
    def project(self, tower: VisionDims, config: Any) -> VisionDims:
        return shuffled(tower, config.scale_factor**2, config.text_config.hidden_size)


_WAY = Blocks(lambda config: config.scale_factor)
_TILES = "tiles stand between marker tokens"
FAMILIES = (
    Idefics("smolvlm", "SmolVLM, SmolVLM2", _TILES, layout=Squares(nested=True), way=_WAY),
    Idefics("idefics3", "Idefics3", _TILES, layout=Squares(nested=True), way=_WAY),
    Family("idefics2", "Idefics2", "a perceiver already reduces an image to 64 tokens"),
    Family("granite_docling", "Granite Docling", layout=Squares(nested=True)),
)
