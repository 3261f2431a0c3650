"""What the vision tower's class token looks at: VisionZip's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Stage, TokenView, ranks, share_of
from st3.methods.scores.picks import interleaved
from st3.methods.scores.registry import register
from st3.methods.scores.uniform import even_spread


@register
@dataclass(frozen=True)
class ClassAttention:
    """Attention of the vision tower's class token, mean over its heads, in the layer whose output
    becomes the visual tokens; besides, an even spread.

    Where it is known how many tokens stay, the class token chooses the share ``dominant`` of them,
    and every n-th of the rest joins them. Where it is not (``keep`` is None), a token counts by the
    better of two places: among the class token's, and in an even spread of all, in that proportion.

    Args:
        dominant: share of the kept tokens that the class token chooses; 1 for FasterVLM's rule.
        keep: share of the visual tokens that the drop leaves.

    Source: VisionZip (arXiv 2412.04467) and its code, which keeps 54 dominant and 10 contextual
    tokens. Departures: nothing is merged into the contextual tokens, they are kept as they are; the
    class token itself, which the code keeps as one of the dominant ones, is no visual token in
    transformers' models, so that one patch more takes its place. Where the tower has no class
    token, what counts is the attention that a token receives.
    """

    dominant: float = 54 / 64
    keep: float | None = None
    name: str = "visionzip"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("tower",)

    def __post_init__(self) -> None:
        check_share("dominant", self.dominant)
        if self.keep is not None:
            check_share("keep", self.keep)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.tower is not None  # the engine gives it or refuses
        if self.keep is None:
            return self._any_number(view, view.tower)
        score = torch.zeros_like(view.tower, dtype=torch.float)
        for tokens, count in view.budgets():
            order = self._of(tokens, view.tower, count, share_of(self.keep, count))
            score = torch.where(tokens, -order.float(), score)
        return score

    def _of(self, tokens: Tensor, tower: Tensor, count: Tensor, kept: Tensor) -> Tensor:
        """The places of the visual ``tokens`` [B, N], ``count`` [B, 1] of which ``kept`` stay."""
        by_class = ranks(tower, tokens)
        dominant = share_of(self.dominant, kept)
        contextual = kept - dominant
        rest = tokens & (by_class >= dominant)
        number = rest.cumsum(1) - 1
        step = ((count - dominant) // contextual.clamp_min(1)).clamp_min(1)
        joins = rest & (number % step == 0) & (number // step < contextual)
        behind = torch.where(joins, dominant + number // step, by_class + kept)
        return torch.where(by_class < dominant, by_class, behind)

    def _any_number(self, view: TokenView, tower: Tensor) -> Tensor:
        spread = ranks(even_spread(view.ordinal), view.visual).float()
        return interleaved(ranks(tower, view.visual).float(), self.dominant, spread)
