"""The model families, a file for each kind. A file here with a tuple ``FAMILIES`` is found by
itself (:mod:`st3.models.registry`)."""

from __future__ import annotations

from typing import Any

from st3.models.base import Family
from st3.models.parts import Parts
from st3.models.parts import find_parts as parts_of
from st3.models.refused import REFUSED
from st3.models.visual import VisualTokens

# What was here before it moved to st3.models.
__all__ = ["REFUSED", "Family", "Parts", "VisualTokens", "family_of", "parts_of"]


def family_of(model: Any, untested: bool = False) -> Family:
    from st3.models.registry import family_of

    return family_of(model, untested)


def __getattr__(name: str) -> Any:
    if name != "FAMILIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from st3.models.registry import families

    return families()
