"""Counts of visual tokens by layer and step, worked out anew for tests/slow_hybrids.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

LARGE = 1 << 30


@dataclass(frozen=True)
class Counts:
    """How many visual tokens are kept: ``1 - P - R * floor((i - F) / S)`` of them in layer ``i``
    from ``F`` on, R from eq. 9, and of those a quarter cosine in decode step t.

    FastV is P alone (``stride`` beyond the last layer).
    """

    first_layer: int = LARGE
    first_drop: float = 0.0
    final_keep: float = 1.0
    stride: int = LARGE
    tau: float | None = None
    floor: float = 0.0

    def share(self, layer: int, layers: int) -> Fraction:
        if layer < self.first_layer:
            return Fraction(1)
        first = 1 - Fraction(str(self.first_drop))
        drops = (layers - self.first_layer) // self.stride
        ratio = (first - Fraction(str(self.final_keep))) / drops if drops else Fraction(0)
        return first - ratio * ((layer - self.first_layer) // self.stride)

    def kept(self, layer: int, layers: int, first: int, n_visual: int) -> int:
        """Of ``layers`` decoder layers; nothing can be dropped before layer ``first``."""
        if layer < first:
            return n_visual
        return math.floor(self.share(layer, layers) * n_visual + Fraction(1, 2))

    def visible(self, kept: int, n_visual: int, step: int) -> int:
        """Of a layer that keeps ``kept``."""
        if self.tau is None:
            return kept
        wave = math.cos(math.pi * step / (2 * self.tau)) if step < self.tau else 0.0
        least = math.floor(Fraction(str(self.floor)) * n_visual + Fraction(1, 2))
        return min(kept, max(math.floor(kept * wave + 0.5), least))
