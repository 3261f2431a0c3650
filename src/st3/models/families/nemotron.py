"""Nemotron-H Omni: one mixer a layer, which is a state, softmax attention, or none."""

from __future__ import annotations

from typing import Any

from torch import nn

from st3.errors import UnsupportedModelError
from st3.models.base import Family
from st3.models.parts import Parts, base_model, decoder_parts
from st3.models.rotary import Unrotate
from st3.models.visual import VisualTokens


class OneTokenAtATime(VisualTokens):
    """The model asks for the places of one kind of placeholder at a time, also those of sounds."""

    def heard(self, result: Any, asked: dict[str, Any]) -> None:
        if asked.get("token_id") != getattr(self.model.config, "audio_token_id", None):
            super().heard(result, asked)


class NemotronOmni(Family):
    def parts(self, model: nn.Module) -> Parts:
        inner: Any = base_model(model)
        if inner.config.video_pruning_rate > 0:
            raise UnsupportedModelError(
                f"{self.model_type} prunes videos itself, so that visual tokens have other places "
                "than in the prompt: set config.video_pruning_rate to 0"
            )
        return decoder_parts(inner.language_model.model, inner, self.model_type)

    def inverse_rotation(self, parts: Parts) -> Unrotate:
        """Nothing is rotated: places are the order of the states."""
        return lambda query, key, tables: (query, key)

    def visual_tokens(self, model: nn.Module, parts: Parts) -> VisualTokens:
        return OneTokenAtATime(base_model(model), parts.inner)


FAMILIES = (
    NemotronOmni("nemotron_h_omni", "Nemotron 3 Omni", "state space layers; audio tokens are text"),
)
