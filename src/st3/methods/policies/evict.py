"""Evict: a whole prefill, then few visual KV entries in each layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Self

from st3.methods.policies.base import Policy, check_flag, check_layer
from st3.methods.policies.layouts import check_within
from st3.methods.policies.registry import register
from st3.methods.schedule import Anneal, Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.registry import score_named


@register
@dataclass(frozen=True)
class Evict(Policy):
    """Evict: all tokens in prefill; then each layer keeps a share of its visual KV entries, by its
    own ranking. The first token is the untrimmed model's; memory and decode steps are saved, time
    in the prefill is not.

    Args:
        layer: first decoder layer (0-based) that keeps fewer.
        keep: share of the visual tokens that it keeps.
        score: by what each layer ranks them; "attention" of the last token as SnapKV takes it,
            "text-rows" as LOOK-M does, "mmr-attention" for importance and diversity as MixKV.
        per_head: whether each KV head keeps those that its own query heads look at, as SnapKV does,
            in place of one choice for all heads of a layer.

    Source: the class of methods that evict after a whole prefill: LOOK-M (arXiv 2406.18139),
    VL-Cache (arXiv 2410.23317), MixKV. Departures: one share for all layers from
    ``layer`` on, and nothing is merged.
    """

    layer: int = 0
    keep: float = 0.35
    score: str = "attention"
    per_head: bool = False

    name: ClassVar[str] = "evict"
    paper: ClassVar[str] = "after LOOK-M (arXiv 2406.18139) and VL-Cache (arXiv 2410.23317)"

    def __post_init__(self) -> None:
        check_layer("layer", self.layer)
        check_share("keep", self.keep)
        score_named(self.score)
        check_flag("per_head", self.per_head)

    def scorer(self) -> Score:
        return score_named(self.score)

    def schedule(self, num_layers: int) -> Schedule:
        check_layer("layer", self.layer, num_layers)
        # A line that is down after one token: from the first step on, the floor.
        shown = Anneal("linear", tau=1, floor=self.keep)
        return Schedule((Fraction(1),) * num_layers, shown, anneal_from=self.layer)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        """The budget of a decode step: in prefill every layer sees every token."""
        check_layer("layer", self.layer, num_layers)
        check_within(mean_keep, num_layers, self.layer, "layer")
        left = (exact(mean_keep) * num_layers - self.layer) / (num_layers - self.layer)
        return replace(self, keep=round(float(left), 12))
