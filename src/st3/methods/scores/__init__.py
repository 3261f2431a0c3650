"""By what visual tokens are ranked: one score a file. A class with ``@register`` in any module of
this package is known by its name, and is an attribute of this package."""

from __future__ import annotations

from typing import Any

from st3.methods.discover import import_all
from st3.methods.scores.base import LayerView, Score, Stage, TokenView, needs_of, stage_of
from st3.methods.scores.registry import SCORES, register, score_named

__all__ = [
    "SCORES",
    "LayerView",
    "Score",
    "Stage",
    "TokenView",
    "needs_of",
    "register",
    "score_named",
    "stage_of",
]

import_all(__name__, __path__)


def __getattr__(name: str) -> Any:
    for score in SCORES.values():
        if type(score).__name__ == name:
            return type(score)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
