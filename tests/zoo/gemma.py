"""Google's models: bidirectional attention inside images or prefixes, sliding windows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from .base import IMAGE, MIXED, VISION_END, VISION_START, WINDOW, Batch, text, vision
from .llava import FixedSize


class PaliGemma(FixedSize):
    """The whole prompt is a prefix that attends both ways (token type 0)."""

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(batch["input_ids"])}


class Gemma3(FixedSize):
    """16 tokens per image, pooled from 64 patches; images attend to themselves both ways."""

    side = 32
    before, after = (VISION_START,), (VISION_END,)

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {"token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _paligemma() -> PreTrainedConfig:
    return PaliGemmaConfig(
        vision_config=vision(SiglipVisionConfig),
        text_config=text(GemmaConfig, num_key_value_heads=1),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )


def _paligemma2() -> PreTrainedConfig:
    return PaliGemmaConfig(
        vision_config=vision(SiglipVisionConfig),
        text_config=text(
            Gemma2Config,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,  # far below the usual 50, so that it shows
            final_logit_softcapping=30.0,
        ),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )


def _gemma3() -> PreTrainedConfig:
    return Gemma3Config(
        vision_config=vision(SiglipVisionConfig, image_size=Gemma3.side),
        text_config=text(
            Gemma3TextConfig, query_pre_attn_scalar=8, sliding_window=WINDOW, layer_types=MIXED
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )


FAMILIES = [
    PaliGemma("paligemma", _paligemma),
    # Older releases choose sdpa here, which leaves out the softcap in silence.
    PaliGemma("paligemma2", _paligemma2, model_type="paligemma", attention="eager"),
    Gemma3("gemma3", _gemma3),
]
