"""InternVL: square tiles in a row, 2 by 2 patches to a token."""

from __future__ import annotations

from typing import Any

from st3.cost.vision import VisionDims
from st3.models.base import Family
from st3.models.layouts import Squares
from st3.models.towers import shuffled
from st3.models.ways import Shuffled


class InternVL(Family):
    def project(self, tower: VisionDims, config: Any) -> VisionDims:
        merge = int(1 / config.downsample_ratio) ** 2
        return shuffled(tower, merge, config.text_config.hidden_size, layers=2)


FAMILIES = (
    InternVL("internvl", "InternVL 2.5, 3, 3.5", layout=Squares(), way=Shuffled()),
    Family("qianfan_ocr", "Qianfan-OCR", layout=Squares()),
)
