"""More models with image grids: GLM-4.6V, GLM-OCR, ERNIE-4.5-VL, PaddleOCR-VL, VideoLLaMA 3,
HunYuan-VL, EXAONE 4.5, the Qwen Omni thinkers."""

from __future__ import annotations

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import IMAGE, PATCH, VIDEO, VISION_END, VISION_START, Batch, I, V, Vision, text, vision
from .qwen import GLM_IDS, IDS, MERGE, QWEN3_VISION, QWEN_IDS, Glm4V, QwenVL, rope


class OneFrame(QwenVL):
    """Patches of single frames."""

    frames_per_patch = 1


class Ernie(OneFrame):
    """Its experts are split by modality, start and end tokens going with the image."""

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        kinds = super().extras(model, batch)["mm_token_type_ids"]
        around = ((ids == VISION_START) | (ids == VISION_END)).int()
        return {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": kinds + around}


class PaddleOCR(OneFrame):
    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        made = super().image(model, segment, rng)
        made.tensors["pixel_values"] = made.tensors["pixel_values"].view(-1, 3, PATCH, PATCH)
        return made


class VideoLlama3(OneFrame):
    """No 3D positions; a merge size for each image."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        made = super().image(model, segment, rng)
        made.tensors["image_merge_sizes"] = torch.tensor([MERGE])
        return made

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {}


class HunYuan(OneFrame):
    """Row ends, begin and end of an image are image tokens as well: h * (w + 1) + 2."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        made = super().image(model, segment, rng)
        h, w = segment.height or 3, segment.width or 4
        made.ids = [VISION_START, *[IMAGE] * (h * (w + 1) + 2), VISION_END]
        return made


class NoTypes(QwenVL):
    """Positions in 1D, or found from the start tokens: no token types."""

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {}


class Omni(NoTypes):
    def video(self, model: PreTrainedModel, segment: V, rng: torch.Generator) -> Vision:
        made = super().video(model, segment, rng)
        made.tensors["video_second_per_grid"] = torch.tensor([1.0])
        return made


def _glm46v() -> PreTrainedConfig:
    return tr.Glm46VConfig(
        vision_config=vision(tr.Glm4vVisionConfig),
        text_config=text(tr.Glm4vTextConfig, rope_parameters=rope()),
        **GLM_IDS,
    )


def _glm_ocr() -> PreTrainedConfig:
    from transformers.models.glm_ocr.configuration_glm_ocr import (
        GlmOcrTextConfig,
        GlmOcrVisionConfig,
    )

    return tr.GlmOcrConfig(
        vision_config=vision(GlmOcrVisionConfig),
        text_config=text(GlmOcrTextConfig, head_dim=8, rope_parameters=rope()),
        **GLM_IDS,
    )


def _ernie() -> PreTrainedConfig:
    from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import (
        Ernie4_5_VLMoeTextConfig,
        Ernie4_5_VLMoeVisionConfig,
    )

    return tr.Ernie4_5_VLMoeConfig(
        vision_config=vision(Ernie4_5_VLMoeVisionConfig),
        text_config=text(
            Ernie4_5_VLMoeTextConfig,
            rope_parameters=rope((1, 1, 2)),
            moe_intermediate_size=[16, 8],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
        ),
        **GLM_IDS,
    )


def _paddleocr() -> PreTrainedConfig:
    from transformers.models.paddleocr_vl.configuration_paddleocr_vl import (
        PaddleOCRTextConfig,
        PaddleOCRVisionConfig,
    )

    return tr.PaddleOCRVLConfig(
        vision_config=vision(PaddleOCRVisionConfig),
        text_config=text(PaddleOCRTextConfig, rope_parameters=rope()),
        **QWEN_IDS,
    )


def _video_llama_3() -> PreTrainedConfig:
    return tr.VideoLlama3Config(
        vision_config=vision(tr.VideoLlama3VisionConfig), text_config=text(tr.Qwen2Config), **IDS
    )


def _hunyuan() -> PreTrainedConfig:
    from transformers.models.hunyuan_vl.configuration_hunyuan_vl import (
        HunYuanVLTextConfig,
        HunYuanVLVisionConfig,
    )

    return tr.HunYuanVLConfig(
        vision_config=vision(
            HunYuanVLVisionConfig,
            temporal_patch_size=1,
            max_image_size=32,
            min_image_size=8,
            text_hidden_size=32,
        ),
        text_config=text(HunYuanVLTextConfig, rope_parameters=rope()),
        image_token_id=IMAGE,
        im_start_id=VISION_START,
        im_end_id=VISION_END,
        im_newline_id=15,
        tie_word_embeddings=False,
    )


def _exaone4_5() -> PreTrainedConfig:
    from transformers.models.exaone4_5.configuration_exaone4_5 import Exaone4_5_VisionConfig

    return tr.Exaone4_5_Config(
        vision_config=vision(
            Exaone4_5_VisionConfig,
            window_size=2 * PATCH * MERGE,
            fullatt_block_indexes=[1],
            num_key_value_heads=2,
        ),
        text_config=text(
            tr.Exaone4Config,
            sliding_window=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
            + ["sliding_attention", "full_attention"],
        ),
        **IDS,
    )


AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "max_source_positions": 16,
}
OMNI_IDS = {
    "audio_config": AUDIO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "audio_start_token_id": 16,
    "audio_end_token_id": 17,
    "user_token_id": 19,
    "tie_word_embeddings": False,
}


def _qwen2_5_omni() -> PreTrainedConfig:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
        Qwen2_5OmniTextConfig,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniVisionEncoderConfig,
    )

    return Qwen2_5OmniThinkerConfig(
        vision_config=vision(
            Qwen2_5OmniVisionEncoderConfig,
            window_size=2 * PATCH * MERGE,
            fullatt_block_indexes=[1],
        ).to_dict(),
        text_config=text(Qwen2_5OmniTextConfig, rope_parameters=rope()).to_dict(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=18,
        **OMNI_IDS,
    )


def _qwen3_omni() -> PreTrainedConfig:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
        Qwen3OmniMoeTextConfig,
        Qwen3OmniMoeThinkerConfig,
        Qwen3OmniMoeVisionEncoderConfig,
    )

    return Qwen3OmniMoeThinkerConfig(
        vision_config=vision(Qwen3OmniMoeVisionEncoderConfig, **QWEN3_VISION).to_dict(),
        text_config=text(Qwen3OmniMoeTextConfig, rope_parameters=rope((2, 1, 1))).to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=18,
        **{**OMNI_IDS, "audio_config": {**AUDIO, "downsample_hidden_size": 8}},
    )


FAMILIES = [
    Glm4V("glm46v", _glm46v, supports_video=True, dynamic_size=True),
    Glm4V("glm_ocr", _glm_ocr, supports_video=True, dynamic_size=True),
    Ernie("ernie4_5_vl_moe", _ernie, dynamic_size=True),
    PaddleOCR("paddleocr_vl", _paddleocr, dynamic_size=True),
    VideoLlama3("video_llama_3", _video_llama_3, dynamic_size=True),
    # Its 3D positions number the images through the whole batch, so rows depend on each other.
    HunYuan("hunyuan_vl", _hunyuan, dynamic_size=True, solo=False),
    NoTypes("exaone4_5", _exaone4_5, supports_video=True, dynamic_size=True),
    Omni("qwen2_5_omni_thinker", _qwen2_5_omni, supports_video=True, dynamic_size=True),
    Omni("qwen3_omni_moe_thinker", _qwen3_omni, supports_video=True, dynamic_size=True),
]
