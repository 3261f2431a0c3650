"""Cohere's families."""

from __future__ import annotations

from st3.models.base import Family
from st3.models.layouts import Squares
from st3.models.tiled import Patches

FAMILIES = (
    Family("aya_vision", "Aya Vision", layout=Squares()),
    Family("cohere2_vision", "Command A Vision", layout=Squares()),
    Family("cohere_compass", "Cohere Compass", layout=Patches()),
)
