"""The untrimmed model."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from st3.methods.policies.base import Policy
from st3.methods.policies.registry import register
from st3.methods.schedule import Schedule


@register
@dataclass(frozen=True)
class NoTrim(Policy):
    """Untrimmed: every layer sees every visual token; the output is bitwise the bare model's."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "baseline"

    def schedule(self, num_layers: int) -> Schedule:
        return Schedule((Fraction(1),) * num_layers)

    def at_budget(self, num_layers: int, mean_keep: float) -> NoTrim:
        if mean_keep != 1:
            raise ValueError("policy 'none' keeps everything: its mean budget is always 100 %")
        return self
