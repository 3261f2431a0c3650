"""Towers that end in strided convolutions: GOT-OCR 2, PP-Chart2Table, DeepSeek-OCR 2, Step 3."""

from __future__ import annotations

from typing import Any

import transformers as tr
from transformers import PreTrainedConfig

from .base import (
    IMAGE,
    MIXED,
    WINDOW,
    text,
    vision,
)
from .fixed import Wrapped
from .llava import FixedSize

SAM: dict[str, Any] = {
    "image_size": 256,
    "patch_size": 16,
    "window_size": 4,
    "output_channels": 16,
    "global_attn_indexes": [1],
    "mlp_dim": 24,
    "num_hidden_layers": 2,
}


class Sam(Wrapped):
    """A SAM tower: 256 pixels, 16 by 16 patches, two strided convolutions: 16 tokens."""

    side = 256


def _got_ocr2() -> PreTrainedConfig:
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig

    return tr.GotOcr2Config(
        vision_config=vision(GotOcr2VisionConfig, **SAM),
        text_config=text(tr.Qwen2Config),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _pp_chart2table() -> PreTrainedConfig:
    from transformers.models.pp_chart2table.configuration_pp_chart2table import (
        PPChart2TableConfig,
        PPChart2TableVisionConfig,
    )

    return PPChart2TableConfig(
        vision_config=vision(PPChart2TableVisionConfig, **SAM),
        text_config=text(tr.Qwen2Config),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


class DeepseekOcr2(Sam):
    """144 learned queries (12 by 12) and a separator."""

    side = 256


def _deepseek_ocr2() -> PreTrainedConfig:
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import (
        DeepseekOcr2SamVisionConfig,
        DeepseekOcr2TextConfig,
        DeepseekOcr2VisionConfig,
        DeepseekOcr2VisionEncoderConfig,
    )

    return tr.DeepseekOcr2Config(
        vision_config=DeepseekOcr2VisionConfig(
            sam_config=vision(DeepseekOcr2SamVisionConfig, **SAM, downsample_channels=[16, 32]),
            encoder_config=text(DeepseekOcr2VisionEncoderConfig, num_hidden_layers=2),
        ),
        text_config=text(
            DeepseekOcr2TextConfig,
            n_group=1,
            topk_group=1,
            mlp_layer_types=["dense"] + ["sparse"] * 7,
        ),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


class Step(FixedSize):
    """Two strided convolutions: 16 by 16 patches to 4 by 4 tokens."""

    side = 64


def _step3p7() -> PreTrainedConfig:
    from transformers.models.step3p7.configuration_step3p7 import (
        Step3p7TextConfig,
        Step3p7VisionConfig,
    )

    return tr.Step3p7Config(
        vision_config=vision(Step3p7VisionConfig, image_size=64, max_position_embeddings=256),
        text_config=text(
            Step3p7TextConfig,
            share_expert_dim=16,
            sliding_window=WINDOW,
            layer_types=MIXED,
            num_sliding_attention_heads=4,
            mlp_layer_types=["dense"] * 2 + ["sparse"] * 6,
        ),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


FAMILIES = [
    Sam("got_ocr2", _got_ocr2),
    Sam("pp_chart2table", _pp_chart2table),
    DeepseekOcr2("deepseek_ocr2", _deepseek_ocr2, multi_image=False),
    Step("step3p7", _step3p7),
]
