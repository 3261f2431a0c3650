"""Gemma 4: patches with 2D positions, full and sliding layers of different head sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4UnifiedConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)

from .base import (
    IMAGE,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    WINDOW,
    Batch,
    Family,
    I,
    V,
    Vision,
    accepts,
    text,
    vision,
)

POOL = 2
LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] + [
    "sliding_attention",
    "full_attention",
] * 2


class Gemma4(Family):
    """I(h, w) in tokens, each pooled from 2 by 2 patches. V(f): frames of 2 by 3 tokens."""

    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        with torch.no_grad():  # no 1 / sqrt(head_dim) here: attention would be all but one-hot
            for name, parameter in model.named_parameters():
                if name.endswith("q_norm.weight"):
                    parameter *= 0.5

    pool = POOL  # patches per token and side that the model still has to pool
    size = 3 * PATCH * PATCH
    most = 24  # tokens; patches of smaller images are padded to this, as the processor does

    def _frames(
        self, count: int, h: int, w: int, most: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        rows, columns = h * self.pool, w * self.pool
        patches = torch.zeros(count, most * self.pool**2, self.size)
        positions = torch.full((count, most * self.pool**2, 2), -1)
        n = rows * columns
        patches[:, :n] = torch.rand(count, n, self.size, generator=rng)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions[:, :n] = torch.stack([x.flatten(), y.flatten()], -1)
        return patches, positions

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        patches, positions = self._frames(1, h, w, self.most, rng)
        ids = [VISION_START, *[IMAGE] * (h * w), VISION_END]
        return Vision(ids, {"pixel_values": patches, "image_position_ids": positions})

    def video(self, model: PreTrainedModel, segment: V, rng: torch.Generator) -> Vision:
        frames, h, w = segment.frames, 2, 3
        patches, positions = self._frames(frames, h, w, h * w, rng)
        ids = [VISION_START, *[VIDEO] * (h * w), VISION_END] * frames
        if not accepts(model, "num_frames_per_video"):  # older: videos in a dimension of their own
            tensors = {"pixel_values_videos": patches[None], "video_position_ids": positions[None]}
            return Vision(ids, tensors)
        tensors = {
            "pixel_values_videos": patches,
            "video_position_ids": positions,
            "num_frames_per_video": torch.tensor([frames]),
        }
        return Vision(ids, tensors)

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


class Gemma4Unified(Gemma4):
    """No vision tower: pooled patches are projected straight into the decoder."""

    pool = 1
    size = 3 * (PATCH * POOL) ** 2


IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "boi_token_id": VISION_START,
    "eoi_token_id": VISION_END,
    "boa_token_id": 16,
    "eoa_token_index": 17,
    "audio_token_id": 18,
    "tie_word_embeddings": False,
}


def _gemma4(**changes: Any) -> PreTrainedConfig:
    return Gemma4Config(
        vision_config=vision(
            Gemma4VisionConfig,
            num_key_value_heads=2,
            head_dim=8,
            pooling_kernel_size=POOL,
            position_embedding_size=32,
        ),
        text_config=text(
            Gemma4TextConfig,
            **{
                "sliding_window": WINDOW,
                "layer_types": LAYERS,
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 120,
                "num_experts": None,
                "moe_intermediate_size": None,
                **changes,
            },
        ),
        **IDS,
    )


def gemma4_large() -> PreTrainedConfig:
    """Like the 31B: images attend both ways, full layers take the keys for values."""
    return _gemma4(
        use_bidirectional_attention="vision", attention_k_eq_v=True, num_global_key_value_heads=1
    )


def gemma4_moe() -> PreTrainedConfig:
    """Like the 26B-A4B: experts beside a dense MLP."""
    return _gemma4(
        use_bidirectional_attention="vision",
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
    )


def gemma4_per_layer() -> PreTrainedConfig:
    """Per-layer inputs as in the E2B and E4B, but without their shared KV."""
    return _gemma4(hidden_size_per_layer_input=8)


def gemma4_shared() -> PreTrainedConfig:
    """Like the E2B and E4B: per-layer inputs, and the last layers take the KV of earlier ones."""
    return _gemma4(hidden_size_per_layer_input=8, num_kv_shared_layers=3)


def _gemma4_unified() -> PreTrainedConfig:
    return Gemma4UnifiedConfig(
        vision_config=vision(
            Gemma4UnifiedVisionConfig,
            pooling_kernel_size=POOL,
            mm_embed_dim=16,
            mm_posemb_size=32,
            output_proj_dims=16,
        ),
        text_config=text(
            Gemma4UnifiedTextConfig,
            sliding_window=WINDOW,
            layer_types=LAYERS,
            global_head_dim=16,
            num_global_key_value_heads=1,
        ),
        **IDS,
    )


ABILITIES: dict[str, Any] = {"supports_video": True, "dynamic_size": True}
FAMILIES = [
    Gemma4("gemma4", gemma4_large, **ABILITIES),
    Gemma4("gemma4_moe", gemma4_moe, model_type="gemma4", **ABILITIES),
    Gemma4("gemma4_per_layer", gemma4_per_layer, model_type="gemma4", gain=1.1, **ABILITIES),
    Gemma4Unified("gemma4_unified", _gemma4_unified, **ABILITIES),
]
