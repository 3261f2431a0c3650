"""Families in which an index of its own chooses the keys that each query sees.

It counts them by column, so that their caches keep the order of the sequence: tokens are dropped by
depth, and never annealed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from st3.errors import UnsupportedModelError
from st3.models.base import Family
from st3.models.parts import Parts, base_model, find_parts

_STATIC = "an index chooses keys by column: no annealing"


class MistralLarge4(Family):
    def parts(self, model: nn.Module) -> Parts:
        """Queries are scaled by their place in the sequence."""
        config: Any = base_model(model).config.get_text_config(decoder=True)
        if any(mode is not None for mode in config.kv_sharing_modes):
            raise UnsupportedModelError(
                f"{self.model_type}: layers of this model read KV entries of earlier ones by an "
                "index of their own, so that none can see fewer tokens"
            )
        return replace(find_parts(model), places=True)


class MiniMax(Family):
    def parts(self, model: nn.Module) -> Parts:
        """Blocks of keys are counted from the first column, padding included."""
        return replace(find_parts(model), pads=False)


class HunYuan4(Family):
    def parts(self, model: nn.Module) -> Parts:
        """Hidden states are several streams."""
        return replace(find_parts(model), streams_last=True)


FAMILIES = (
    MiniMax("minimax_m3_vl", "MiniMax M3 VL", _STATIC),
    MistralLarge4("mistral_large4", "Mistral Large 4", _STATIC),
    HunYuan4("hy_v4_vl", "Hunyuan 4 VL", _STATIC),
)
