"""DyCoke's decode rule: show few visual tokens, and choose them anew as the text goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from st3.methods.policies.base import Policy, check_count, check_layer
from st3.methods.policies.layouts import check_within
from st3.methods.policies.registry import register
from st3.methods.schedule import Anneal, Schedule, check_share, exact


@register
@dataclass(frozen=True)
class DyCoke(Policy):
    """DyCoke: all tokens in prefill; decode steps see a share of them, recalled as needed.

    Args:
        layer: first decoder layer (0-based) that shows fewer tokens while decoding.
        keep: share of the visual tokens that it shows.
        every: decode steps after which that share is chosen anew from ALL stored visual tokens, by
            the current token's attention; until then it is the choice of the prompt's last token.

    Source: the dynamic pruning of DyCoke (arXiv 2411.15024) and its code. Departures: each layer
    chooses by its own attention, not by that of one layer; the first choice is that of the prompt's
    last token, where the code takes the first new token's; it chooses anew at fixed steps, where
    the code does so at every step, and reads the whole cache at those whose attention has a cosine
    of 0.9 or more with the step before; video frames are not merged in prefill. Nothing is freed:
    what is saved is the reading of hidden entries.
    """

    layer: int = 3
    keep: float = 0.3
    every: int = 8

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = "arXiv 2411.15024 (CVPR 2025)"

    def __post_init__(self) -> None:
        check_layer("layer", self.layer)
        check_share("keep", self.keep)
        check_count("every", self.every)

    @property
    def rerank(self) -> int | None:
        return self.every

    @property
    def recalls(self) -> bool:
        return True

    def schedule(self, num_layers: int) -> Schedule:
        check_layer("layer", self.layer, num_layers)
        # A line that is down after one token: from the first step on, the floor.
        shown = Anneal("linear", tau=1, floor=self.keep)
        return Schedule((Fraction(1),) * num_layers, shown, anneal_from=self.layer)

    def at_budget(self, num_layers: int, mean_keep: float) -> DyCoke:
        """The budget of a decode step: in prefill every layer sees every token."""
        check_layer("layer", self.layer, num_layers)
        check_within(mean_keep, num_layers, self.layer, "layer")
        left = (exact(mean_keep) * num_layers - self.layer) / (num_layers - self.layer)
        return replace(self, keep=round(float(left), 12))
