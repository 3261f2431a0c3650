"""Random choice at the counts of another method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from st3.methods.policies.base import Policy, check_count
from st3.methods.policies.registry import register
from st3.methods.policies.thirds import Thirds
from st3.methods.schedule import Schedule
from st3.methods.scores.base import Score
from st3.methods.scores.random import RandomScore


@register
@dataclass(frozen=True)
class Random(Policy):
    """Random: the same counts as another policy, chosen at random. The baseline of every table.

    Args:
        like: the policy whose counts are used, by default the default policy.
        seed: which random choice.

    Source: random is a strong baseline at equal budget (arXiv 2502.11501).
    """

    like: Policy = field(default_factory=Thirds)
    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline, see arXiv 2502.11501"

    def __post_init__(self) -> None:
        if not isinstance(self.like, Policy):
            raise ValueError(f"like must be an st3 policy, got {self.like!r}")
        check_count("seed", self.seed, 0)

    def scorer(self) -> Score:
        return RandomScore(self.seed)

    def schedule(self, num_layers: int) -> Schedule:
        return self.like.schedule(num_layers)

    def at_budget(self, num_layers: int, mean_keep: float) -> Random:
        return replace(self, like=self.like.at_budget(num_layers, mean_keep))
