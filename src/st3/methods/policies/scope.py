"""SCOPE: salient tokens that cover the others, chosen before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from st3.methods.policies.layouts import BeforeDecoder
from st3.methods.policies.registry import register
from st3.methods.scores.base import Score
from st3.methods.scores.scope import Scope


@register
@dataclass(frozen=True)
class SCOPE(BeforeDecoder):
    """SCOPE: before the decoder, keep what the vision tower attends to and what covers the rest.

    Args:
        keep: share kept.
        alpha: power to which the tower's attention is raised.

    Source: SCOPE, as in Tencent/AngelSlim; departures: see :class:`st3.methods.scores.Scope`.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "SCOPE, as in Tencent/AngelSlim"

    def scorer(self) -> Score:
        return Scope(self.alpha)
