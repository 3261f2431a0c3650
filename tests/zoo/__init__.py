"""Tiny random-weight models of every vision-language family, for the tests.

>>> family = FAMILIES["llava"]
>>> model = family.model()
>>> batch = family.inputs(model, [[T(5), I(), T(4)], [T(7)]])
>>> model(**batch).logits.shape[:2] == family.visual_mask(model, batch).shape
True
"""

from __future__ import annotations

from transformers import PreTrainedModel

from . import (
    codes,
    fixed,
    gemma,
    gemma4,
    grids,
    hybrids,
    idefics,
    indexed,
    llava,
    mistral,
    newer,
    newer_grids,
    queries,
    qwen,
    sam,
)
from .base import Batch, Family, I, T, V
from .refused import REFUSED, UNTRIED

_MODULES = (
    llava,
    qwen,
    gemma,
    idefics,
    mistral,
    grids,
    gemma4,
    fixed,
    codes,
    queries,
    sam,
    newer,
    newer_grids,
)
FAMILIES: dict[str, Family] = {
    family.name: family for module in _MODULES for family in module.FAMILIES if family.available
}

INDEXED: dict[str, Family] = {f.name: f for f in indexed.FAMILIES if f.available}
HYBRIDS: dict[str, Family] = {f.name: f for f in hybrids.FAMILIES if f.available}


def build(name: str, seed: int = 0) -> tuple[Family, PreTrainedModel]:
    """The family of this name and a fresh model of it."""
    family = FAMILIES.get(name) or HYBRIDS.get(name) or INDEXED[name]
    return family, family.model(seed)


__all__ = [
    "FAMILIES",
    "HYBRIDS",
    "INDEXED",
    "REFUSED",
    "UNTRIED",
    "Batch",
    "Family",
    "I",
    "T",
    "V",
    "build",
]
