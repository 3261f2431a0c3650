"""The LLaVA group: a plain vision tower, a projector, a LLaMA or Qwen2 decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel

from .base import IMAGE, Family, I, Vision, pixels, text

PATCH = 4


def clip(side: int, **changes: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        **{
            **dict(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=side,
                patch_size=PATCH,
                projection_dim=16,
            ),
            **changes,
        }
    )


class Llava(Family):
    """Fixed size, (side / PATCH)^2 tokens per image."""

    side = 16

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        ids = [IMAGE] * (self.side // PATCH) ** 2
        return Vision(ids, {"pixel_values": pixels(1, 3, self.side, self.side, rng=rng)})


def _llava() -> LlavaConfig:
    return LlavaConfig(
        vision_config=clip(Llava.side),
        text_config=LlamaConfig(**text()),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


FAMILIES = [Llava("llava", _llava)]
