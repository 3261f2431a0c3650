"""VTW: all visual tokens leave half way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from st3.methods.policies.base import Policy, check_layer
from st3.methods.policies.layouts import check_within
from st3.methods.policies.registry import register
from st3.methods.schedule import Schedule, exact


@register
@dataclass(frozen=True)
class VTW(Policy):
    """VTW: withdraw all visual tokens from ``layer`` on.

    Args:
        layer: first decoder layer without visual tokens (the paper's K); None is half of the
            layers, the proportion of the paper's 15 or 16 of 32. The paper calibrates it by a KL
            divergence: :func:`st3.calibrate_vtw`.

    Source: arXiv 2405.05803 (AAAI 2025).
    """

    layer: int | None = None

    name: ClassVar[str] = "vtw"
    paper: ClassVar[str] = "arXiv 2405.05803 (AAAI 2025)"

    def __post_init__(self) -> None:
        check_layer("layer", self.layer)
        if self.layer == 0:
            raise ValueError("layer must be at least 1: at 0 the model would never see the image")

    def schedule(self, num_layers: int) -> Schedule:
        if num_layers < 2:
            raise ValueError("VTW needs at least 2 decoder layers: the first must see the image")
        layer = num_layers // 2 if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        return Schedule((Fraction(1),) * layer + (Fraction(0),) * (num_layers - layer))

    def at_budget(self, num_layers: int, mean_keep: float) -> VTW:
        """VTW at the layer whose mean share is nearest to ``mean_keep``."""
        check_within(mean_keep, num_layers, 1, "number of layers without visual tokens")
        return replace(self, layer=min(round(exact(mean_keep) * num_layers), num_layers - 1))
