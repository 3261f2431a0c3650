"""Pruning by the norm of keys: the part of ViTCoP that runs inside of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import Staged
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.key_norm import KeyNorm


@register
@dataclass(frozen=True)
class KeyNormPruning(Staged):
    """Key norm: two drops of the tokens with the largest keys, which draw the least attention.

    Args:
        layers: first decoder layers (0-based) with fewer tokens, one shallow and one deep.
        keep: shares left there.

    Source: the saliency of ViTCoP (arXiv 2601.17818) inside of the decoder, the norm of the key
    averaged over the heads, of the layer before. Departures: the vision tower drops nothing
    (its first stage is a class token's attention: ``visionzip:dominant=1``), the shallow stage
    does not cluster, and layers and shares are this project's, not the paper's.
    """

    keep: tuple[float, ...] = (0.4, 0.1)

    name: ClassVar[str] = "keynorm"
    paper: ClassVar[str] = "arXiv 2601.17818 (ViTCoP), arXiv 2406.11430"
    paper_layers: ClassVar[tuple[int, ...]] = (3, 16)

    def scorer(self) -> Score:
        return KeyNorm()
