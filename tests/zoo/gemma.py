"""Google's models: bidirectional attention inside images or prefixes, sliding windows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from .base import IMAGE, VISION_END, VISION_START, Batch, Family, I, Vision, pixels, text

PATCH, SIDE = 4, 16


def siglip(side: int = SIDE) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=PATCH,
        vision_use_head=False,
    )


class Gemma3(Family):
    """16 tokens per image, pooled from 64 patches; images attend to themselves both ways."""

    side = 32

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        ids = [VISION_START, *[IMAGE] * 16, VISION_END]
        return Vision(ids, {"pixel_values": pixels(1, 3, self.side, self.side, rng=rng)})

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {"token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _gemma3() -> Gemma3Config:
    layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
    return Gemma3Config(
        vision_config=siglip(Gemma3.side),
        text_config=Gemma3TextConfig(
            **text(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, layer_types=layers)
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )


FAMILIES = [Gemma3("gemma3", _gemma3)]
