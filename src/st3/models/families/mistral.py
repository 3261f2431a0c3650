"""Pixtral's tower: images of any size, a row-break token behind each row of patches."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from st3.cost.vision import VisionDims
from st3.models.base import Family
from st3.models.layouts import Pixtral
from st3.models.towers import two_linear


class Mistral3(Family):
    def project(self, tower: VisionDims, config: Any) -> VisionDims:
        """Patches are merged by one matrix, then LLaVA's two layers."""
        merge = config.spatial_merge_size**2
        projected = two_linear(tower, config)
        return replace(
            projected,
            projector=projected.projector + merge * tower.hidden**2,
            patches_per_token=Fraction(merge),
        )


FAMILIES = (
    Mistral3(
        "mistral3",
        "Mistral 3",
        "row-break tokens between patches are text",
        layout=Pixtral(),
    ),
    Family("lighton_ocr", "LightOnOCR", layout=Pixtral()),
)
