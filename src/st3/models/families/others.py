"""Families of one kind each."""

from __future__ import annotations

from typing import Any

from st3.cost.dims import Lookahead
from st3.models.base import Family
from st3.models.layouts import RowRuns, Squares
from st3.models.tiled import EndedRows, Patches


class Molmo2(Family):
    def lookahead(self, text: Any, window: int | None) -> Lookahead:
        return "images"


FAMILIES = (
    Family("aria", "Aria"),
    Family("emu3", "Emu3 (understanding)", layout=EndedRows()),
    Family("fuyu", "Fuyu", layout=RowRuns()),
    Family("kimi_k25", "Kimi K2.5", "multi-head latent attention", layout=Patches(reading=True)),
    Molmo2("molmo2", "Molmo 2", layout=RowRuns()),
    Family("muse_glimmer", "Muse Glimmer", layout=Patches(reading=True)),
    Family("muse_spark", "Muse Spark", layout=Patches(reading=True)),
    Family("ovis2", "Ovis2", layout=Squares()),
    Family("perception_lm", "Perception LM", layout=Squares()),
    Family("step3p7", "Step 3.7", layout=Squares(placed=False)),
)
