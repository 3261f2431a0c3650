"""Late families with image grids: Cohere Compass, Cosmos 3, HyperCLOVA X, Kimi K2.5, Muse."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import (
    IMAGE,
    MIXED,
    PATCH,
    VIDEO,
    WINDOW,
    Batch,
    I,
    Vision,
    text,
    vision,
)
from .grids import NoTypes, OneFrame
from .qwen import IDS, MERGE, QWEN3_VISION, QWEN_IDS, Qwen3VL, rope


def _cohere_compass() -> PreTrainedConfig:
    from transformers.models.cohere_compass.configuration_cohere_compass import (
        CohereCompassTextConfig,
        CohereCompassVisionConfig,
    )

    rotary = {"full_attention": rope((2, 1, 1)), "sliding_attention": rope((2, 1, 1))}
    return tr.CohereCompassConfig(
        vision_config=vision(CohereCompassVisionConfig, **QWEN3_VISION),
        text_config=text(
            CohereCompassTextConfig,
            sliding_window=WINDOW,
            layer_types=MIXED,
            rope_parameters=rotary,
        ),
        **QWEN_IDS,
    )


def _cosmos3_edge() -> PreTrainedConfig:
    from transformers.models.cosmos3_edge.configuration_cosmos3_edge import (
        Cosmos3EdgeTextConfig,
        Cosmos3EdgeVisionConfig,
    )

    return tr.Cosmos3EdgeConfig(
        vision_config=vision(Cosmos3EdgeVisionConfig, num_patches=16),
        text_config=text(Cosmos3EdgeTextConfig, rope_parameters=rope((2, 1, 1))),
        projector_hidden_size=32,
        **QWEN_IDS,
    )


def _cosmos3_omni() -> PreTrainedConfig:
    return tr.Cosmos3OmniConfig(
        vision_config=vision(tr.Qwen3VLVisionConfig, **QWEN3_VISION),
        text_config=text(tr.Qwen3VLTextConfig, rope_parameters=rope((2, 1, 1))),
        **QWEN_IDS,
    )


def _hyperclovax() -> PreTrainedConfig:
    return tr.HyperCLOVAXVisionV2Config(
        vision_config=vision(
            tr.Qwen2_5_VLVisionConfig, window_size=2 * PATCH * MERGE, fullatt_block_indexes=[1]
        ),
        text_config=text(tr.HyperCLOVAXConfig),
        **IDS,
    )


class Kimi(OneFrame):
    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        made = super().image(model, segment, rng)
        made.tensors["pixel_values"] = made.tensors["pixel_values"].view(-1, 3, PATCH, PATCH)
        return made

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {}


def _kimi_k25() -> PreTrainedConfig:
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig

    return tr.Kimi_K25Config(
        vision_config=vision(Kimi_K25VisionConfig, pos_emb_height=8, pos_emb_width=8),
        text_config=text(
            tr.DeepseekV3Config,
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=2,
        ),
        projection_hidden_size=16,
        **QWEN_IDS,
    )


MUSE_VISION: dict[str, Any] = {
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "max_position_embeddings": 64,
    "layer_types": ["window_attention", "full_attention"],
}


MUSE: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "out_hidden_size": 64,
    "projector_hidden_size": 32,
}


def _muse_glimmer() -> PreTrainedConfig:
    from transformers.models.muse_glimmer.configuration_muse_glimmer import (
        MuseGlimmerTextConfig,
        MuseGlimmerVisionConfig,
    )

    return tr.MuseGlimmerConfig(
        vision_config=vision(MuseGlimmerVisionConfig, **MUSE_VISION),
        text_config=text(
            MuseGlimmerTextConfig,
            sliding_window=WINDOW,
            layer_types=MIXED,
            layer_rope_theta=[1e4, 1e4, 0, 1e4] * 2,
            output_multiplier=1.0,
            qk_scale_factor=1.0,
        ),
        **MUSE,
    )


def _muse_spark() -> PreTrainedConfig:
    from transformers.models.muse_spark.configuration_muse_spark import (
        MuseSparkAudioConfig,
        MuseSparkTextConfig,
        MuseSparkVisionConfig,
    )

    return tr.MuseSparkConfig(
        vision_config=vision(MuseSparkVisionConfig, **MUSE_VISION),
        audio_config=MuseSparkAudioConfig(
            hidden_sizes=[8, 8, 8, 32], depths=[1, 1, 1, 1], out_hidden_size=32
        ),
        text_config=text(
            MuseSparkTextConfig,
            sliding_window=WINDOW,
            layer_types=MIXED,
            layer_rope_theta=[1e4, 1e4, 0, 1e4] * 2,
            output_multiplier=1.0,
            qk_scale_factor=1.0,
            moe_hidden_size=32,
        ),
        audio_token_id=18,
        **MUSE,
    )


class MuseSpark(NoTypes):
    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        with torch.no_grad():  # weak residual gates, or rounding grows from norm to norm
            for name, parameter in model.named_parameters():
                if name.endswith("residual_gate.gate"):
                    parameter.fill_(-0.6)


FAMILIES = [
    Qwen3VL("cohere_compass", _cohere_compass, supports_video=True, dynamic_size=True),
    OneFrame("cosmos3_edge", _cosmos3_edge, dynamic_size=True),
    Qwen3VL("cosmos3_omni", _cosmos3_omni, supports_video=True, dynamic_size=True),
    NoTypes("hyperclovax_vision_v2", _hyperclovax, supports_video=True, dynamic_size=True),
    Kimi("kimi_k25", _kimi_k25, dynamic_size=True),
    NoTypes("muse_glimmer", _muse_glimmer, dynamic_size=True),
    MuseSpark("muse_spark", _muse_spark, dynamic_size=True),
]
