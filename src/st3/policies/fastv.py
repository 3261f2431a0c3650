"""FastV: one drop after the first layers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from st3.policies.base import Policy, check_layer, register
from st3.schedule import Schedule, check_share, exact


@register
@dataclass(frozen=True)
class FastV(Policy):
    """FastV: drop a share of the visual tokens once, by the attention of the layer before.

    Args:
        layer: first decoder layer that sees fewer visual tokens (the paper's K, at least 1).
        drop: share dropped (the paper's R).

    Source: arXiv 2403.06764. The scores come from the last row alone, not from a full attention
    map; the choice of tokens is the same.
    """

    layer: int = 2
    drop: float = 0.5

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv 2403.06764 (ECCV 2024)"

    def __post_init__(self) -> None:
        check_layer("layer", self.layer)
        if self.layer < 1:
            raise ValueError(
                "layer must be at least 1: FastV reads the attention of the layer before"
            )
        check_share("drop", self.drop)

    def schedule(self, num_layers: int) -> Schedule:
        check_layer("layer", self.layer, num_layers)
        left = 1 - exact(self.drop)
        return Schedule((Fraction(1),) * self.layer + (left,) * (num_layers - self.layer))
