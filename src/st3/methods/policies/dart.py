"""DART: what duplicates a few pivots least stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.base import check_count
from st3.methods.policies.layouts import Staged
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.dart import Dart


@register
@dataclass(frozen=True)
class DART(Staged):
    """DART: one drop after the first layers, by how little a token duplicates the pivots.

    Args:
        layers: first decoder layer (0-based) with fewer tokens (the paper's K).
        keep: share left.
        image_pivots, text_pivots: tokens with the largest keys that others are compared with.

    Source: arXiv 2502.11494 (EMNLP 2025); departures: see :class:`st3.methods.scores.Dart`.
    """

    keep: tuple[float, ...] = (0.222,)
    image_pivots: int = 4
    text_pivots: int = 4

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "arXiv 2502.11494 (EMNLP 2025)"
    paper_layers: ClassVar[tuple[int, ...]] = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_pivots", "text_pivots"):
            check_count(name, getattr(self, name))

    def scorer(self) -> Score:
        only = self.keep[0] if len(self.keep) == 1 else None
        return Dart(self.image_pivots, self.text_pivots, only)
