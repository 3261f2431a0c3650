"""PyramidDrop: drops at the ends of equal stages."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from st3.methods.policies.base import Policy, check_count, check_flag
from st3.methods.policies.layouts import check_within, with_keep
from st3.methods.policies.registry import register
from st3.methods.schedule import Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.registry import score_named


@register
@dataclass(frozen=True)
class PyramidDrop(Policy):
    """PyramidDrop: cut the depth into equal stages and keep a share of what is left after each.

    Args:
        stages: number of stages (the paper's S + 1: drops after layers 8, 16 and 24 of 32 are 4).
        keep: share kept at the end of each stage (the paper's lambda).
        score: by what tokens are ranked; the paper's is the last token's attention.
        own_layer: whether the tokens are ranked in the layer that drops, as the code does, and not
            in the layer before.

    Source: arXiv 2410.17247 and its code. Departures: without ``own_layer`` the last instruction
    token's attention comes from the layer before a drop, which chooses other tokens (half of the
    first choice differs); positions are kept, where the code numbers what is left anew.
    """

    stages: int = 4
    keep: float = 0.5
    score: str = "attention"
    own_layer: bool = False

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "arXiv 2410.17247 (CVPR 2025)"

    def __post_init__(self) -> None:
        score_named(self.score)
        check_count("stages", self.stages, 2)
        check_share("keep", self.keep)
        check_flag("own_layer", self.own_layer)

    def scorer(self) -> Score:
        return score_named(self.score)

    def schedule(self, num_layers: int) -> Schedule:
        if self.stages > num_layers:
            raise ValueError(
                f"{self.stages} stages do not fit {num_layers} layers: use at most {num_layers}"
            )
        shares: list[Fraction] = []
        for layer in range(num_layers):
            shares.append(exact(self.keep) ** (layer * self.stages // num_layers))
        return Schedule(tuple(shares))

    def at_budget(self, num_layers: int, mean_keep: float) -> PyramidDrop:
        check_within(
            mean_keep, num_layers, -(-num_layers // self.stages), "first stage: more stages"
        )
        return with_keep(self, num_layers, mean_keep, bound="stages")
