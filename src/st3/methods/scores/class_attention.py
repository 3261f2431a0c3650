"""What the vision tower's class token looks at: VisionZip's score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from st3.methods.scores.base import Stage, TokenView, ranks
from st3.methods.scores.registry import register
from st3.methods.scores.uniform import even_spread


@register
@dataclass(frozen=True)
class ClassAttention:
    """Attention of the vision tower's class token, mean over its heads, in the layer whose output
    becomes the visual tokens; besides, an even spread.

    A token counts by the better of two places: among the class token's, and in an even spread, in
    the proportion ``dominant`` to ``1 - dominant``.

    Args:
        dominant: share of the kept tokens that the class token chooses; 1 for FasterVLM's rule.

    Source: VisionZip (arXiv 2412.04467), which keeps 54 dominant and 10 contextual tokens.
    Departure: the contextual tokens are an even spread of the image, kept as they are: nothing is
    merged into them.
    """

    dominant: float = 54 / 64
    name: str = "visionzip"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("tower",)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.tower is not None  # the engine gives it or refuses
        place = ranks(view.tower, view.visual).float()
        if self.dominant == 1:
            return -place
        spread = ranks(even_spread(view.ordinal), view.visual).float()
        if self.dominant == 0:
            return -spread
        return -(place / self.dominant).minimum(spread / (1 - self.dominant))
