"""VScan: tokens of every window and of the whole image before the decoder, later fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from st3.methods.policies.base import Policy, check_layer
from st3.methods.policies.layouts import with_keep
from st3.methods.policies.registry import register
from st3.methods.schedule import Schedule, check_share, exact
from st3.methods.scores.base import Score
from st3.methods.scores.vscan import LocalGlobal


@register
@dataclass(frozen=True)
class VScan(Policy):
    """VScan: before the decoder, keep what the vision tower attends to in each window and anywhere;
    half way through the decoder, a third of it by the last token's attention.

    Args:
        keep: share kept before the decoder; 96 of 576 tokens are 0.1667.
        later: share of these that the decoder keeps from ``layer`` on.
        layer: decoder layer (0-based) that sees fewer; None is half of the depth, the authors' 16
            of 32 and 14 of 28.

    Source: arXiv 2505.22654 (TMLR 2026); departures: see :class:`st3.methods.scores.LocalGlobal`.
    """

    keep: float = 0.1667
    later: float = 0.3333
    layer: int | None = None

    name: ClassVar[str] = "vscan"
    paper: ClassVar[str] = "arXiv 2505.22654 (TMLR 2026)"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_share("later", self.later)
        check_layer("layer", self.layer)

    def schedule(self, num_layers: int) -> Schedule:
        layer = num_layers // 2 if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        before = exact(self.keep)
        behind = before * exact(self.later)
        return Schedule((before,) * layer + (behind,) * (num_layers - layer))

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        return with_keep(self, num_layers, mean_keep, bound="later")

    def scorer(self) -> Score:
        return LocalGlobal(keep=self.keep)
