"""FastV: one drop after the first layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from st3.methods.policies.base import Policy, check_layer
from st3.methods.policies.layouts import check_within, stage_schedule
from st3.methods.policies.registry import register
from st3.methods.schedule import Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.registry import score_named


@register
@dataclass(frozen=True)
class FastV(Policy):
    """FastV: drop a share of the visual tokens once, by the attention of the layer before.

    Args:
        layer: first decoder layer that sees fewer visual tokens (the paper's K, at least 1).
        drop: share dropped (the paper's R).
        score: by what tokens are ranked; the paper's is the last token's attention.

    Source: arXiv 2403.06764. The scores come from the last row alone, not from a full attention
    map; the choice of tokens is the same.
    """

    layer: int = 2
    drop: float = 0.5
    score: str = "attention"

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv 2403.06764 (ECCV 2024)"

    def __post_init__(self) -> None:
        score_named(self.score)
        check_layer("layer", self.layer)
        if self.layer < 1:
            raise ValueError(
                "layer must be at least 1: FastV reads the attention of the layer before"
            )
        check_share("drop", self.drop)

    def scorer(self) -> Score:
        return score_named(self.score)

    def schedule(self, num_layers: int) -> Schedule:
        check_layer("layer", self.layer, num_layers)
        return stage_schedule(num_layers, [self.layer], [1 - exact(self.drop)])

    def at_budget(self, num_layers: int, mean_keep: float) -> FastV:
        check_layer("layer", self.layer, num_layers)
        check_within(mean_keep, num_layers, self.layer, "layer")
        left = (exact(mean_keep) * num_layers - self.layer) / (num_layers - self.layer)
        return replace(self, drop=round(float(1 - left), 12))
