"""Google's families: an image, or the whole prompt, attends in both directions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from st3.cost.dims import Lookahead
from st3.cost.vision import VisionDims
from st3.models.base import Family
from st3.models.layouts import Positioned, Squares
from st3.models.ways import Blocks, Way


class PaliGemma(Family):
    def lookahead(self, text: Any, window: int | None) -> Lookahead:
        return "prompt"

    def project(self, tower: VisionDims, config: Any) -> VisionDims:
        """One matrix."""
        return replace(tower, projector=tower.hidden * config.text_config.hidden_size)


class Gemma3(Family):
    def lookahead(self, text: Any, window: int | None) -> Lookahead:
        return "image"

    def project(self, tower: VisionDims, config: Any) -> VisionDims:
        """Patches are averaged, then one matrix."""
        return replace(
            tower,
            projector=tower.hidden * config.text_config.hidden_size,
            patches_per_token=Fraction(tower.crop_patches or 1, config.mm_tokens_per_image),
        )


class Gemma4(Family):
    def lookahead(self, text: Any, window: int | None) -> Lookahead:
        """The larger models let an image look ahead, in the layers with a window."""
        ahead = getattr(text, "use_bidirectional_attention", None) == "vision"
        return "image" if ahead and window is not None else "none"


def _pooled(config: Any) -> int:
    """Patches along the side of what Gemma 3 averages to one token."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size / config.mm_tokens_per_image**0.5)


FAMILIES = (
    PaliGemma(
        "paligemma",
        "PaliGemma 1, 2",
        "the whole prompt attends in both directions",
        layout=Squares(),
        way=Way(),
    ),
    Gemma3(
        "gemma3",
        "Gemma 3",
        "sliding windows; an image attends in both directions",
        layout=Squares(),
        way=Blocks(_pooled),
    ),
    Gemma4(
        "gemma4",
        "Gemma 4",
        "in the E models, no visual token enters the layers that share KV entries",
        layout=Positioned(),
    ),
    Family("gemma3n", "Gemma 3n", "no visual token enters the layers that share KV entries"),
    Gemma4("gemma4_unified", "Gemma 4 (unified)", layout=Positioned(pooled=False)),
)
