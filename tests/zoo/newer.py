"""Families that came late, or have an input format of their own."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import (
    BREAK,
    IMAGE,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    Batch,
    Family,
    I,
    Vision,
    pixels,
    text,
    tiny,
    vision,
)
from .fixed import SAM, Sam
from .grids import NoTypes, OneFrame
from .idefics import Idefics
from .llava import FixedSize
from .mistral import Pixtral, tower
from .qwen import IDS, MERGE, QWEN3_VISION, QWEN_IDS, Qwen3VL, rope

WINDOW = 16
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2


class Molmo2(Family):
    """The whole image (2 by 2 tokens), then two crops side by side (2 by 4 tokens), each token
    pooled from 4 patches, whose indices go through the whole batch. Features are added to the
    placeholders' embeddings. All image tokens of a row attend to each other."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        crops, side = 3, 4
        patches = pixels(crops, side * side, 3 * PATCH * PATCH, rng=rng)
        whole = torch.arange(side * side).view(side, side)
        high = torch.arange(side * side, 3 * side * side).view(2, side, side)
        high = high.permute(1, 0, 2).reshape(side, 2 * side)
        pooled = [
            grid.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).flatten(0, 1) for grid in (whole, high)
        ]
        ids = [VISION_START, *([IMAGE] * 2 + [BREAK]) * 2, VISION_END]
        ids += [VISION_START, *([IMAGE] * 4 + [BREAK]) * 2, VISION_END]
        tensors = {
            "pixel_values": patches,
            "image_token_pooling": torch.cat(pooled),
            "image_grids": torch.tensor([[2, 2, 2, 4]]),
            "image_num_crops": torch.tensor([crops]),
        }
        return Vision(ids, tensors)

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        seen = 0
        for image in (image for row in per_row for image in row):
            image.tensors["image_token_pooling"] += seen
            seen += image.tensors["pixel_values"].shape[:2].numel()
        return super().collate(per_row)

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        kinds = torch.tensor([IMAGE, BREAK, VISION_START, VISION_END])
        return {"mm_token_type_ids": torch.isin(batch["input_ids"], kinds).long()}


def _molmo2() -> PreTrainedConfig:
    from transformers.models.molmo2.configuration_molmo2 import (
        Molmo2AdapterConfig,
        Molmo2TextConfig,
        Molmo2VisionConfig,
    )

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return tr.Molmo2Config(
        vision_config=vision(
            Molmo2VisionConfig, image_size=[16, 16], num_position_embeddings=16, **heads
        ),
        adapter_config=tiny(
            Molmo2AdapterConfig,
            heads,
            hidden_size=16,
            intermediate_size=24,
            text_hidden_size=32,
            vision_feature_layer=[1, 0],
        ),
        text_config=text(Molmo2TextConfig, additional_vocab_size=8),
        image_start_token_id=VISION_START,
        low_res_image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        image_patch_id=IMAGE,
        frame_start_token_id=16,
        frame_end_token_id=17,
        tie_word_embeddings=False,
    )


class Idefics2(Idefics):
    """A perceiver makes 12 tokens of each image."""

    side, tokens = 16, 12


def _idefics2() -> PreTrainedConfig:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

    return tr.Idefics2Config(
        vision_config=vision(Idefics2VisionConfig),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 12,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=text(tr.MistralConfig, sliding_window=None),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


class GraniteDocling(Idefics):
    """Tiles with a mask of those that are there; vision features join the first layers, too."""

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        made = super().collate(per_row)
        if made:
            made["pixel_attention_mask"] = (made["pixel_values"] != 0).any(-1).any(-1).any(-1)
        return made


def _granite_docling() -> PreTrainedConfig:
    from transformers.models.granite_docling.configuration_granite_docling import (
        GraniteDoclingTextConfig,
        GraniteDoclingVisionConfig,
    )

    return tr.GraniteDoclingConfig(
        vision_config=vision(
            GraniteDoclingVisionConfig,
            image_size=32,
            num_hidden_layers=4,
            scale_factor=2,
            deepstack_visual_indexes=[1, 2, 3],
            use_fine_route=False,
        ),
        text_config=text(
            GraniteDoclingTextConfig,
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            attention_multiplier=8**-0.5,
        ),
        image_token_id=IMAGE,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


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


def _lighton_ocr() -> PreTrainedConfig:
    return tr.LightOnOcrConfig(
        vision_config=tower(),
        text_config=text(tr.Qwen3Config),
        image_token_id=IMAGE,
        spatial_merge_size=2,
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


class PerceptionLM(FixedSize):
    """pixel_values [images, tiles, 3, H, W]."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        return Vision([IMAGE] * 16, {"pixel_values": pixels(1, 1, 3, 16, 16, rng=rng)})


def _perception_lm() -> PreTrainedConfig:
    tower_ = vision(tr.SiglipVisionConfig)  # in place of the timm tower, which needs that package
    tower_.model_args = {"embed_dim": 16}
    return tr.PerceptionLMConfig(
        vision_config=tower_,
        vision_use_cls_token=False,
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


class FastVlm(FixedSize):
    """A convolutional tower (a ResNet here, in place of timm's): feature maps of 4 by 4."""

    side, tokens = 32, 16


def _fast_vlm() -> PreTrainedConfig:
    tower_ = tr.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic"
    )
    tower_.hidden_size = 16
    return tr.FastVlmConfig(
        vision_config=tower_,
        text_config=text(tr.Qwen2Config),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


FAMILIES = [
    Molmo2("molmo2", _molmo2),
    Idefics2("idefics2", _idefics2, dynamic_size=True),
    GraniteDocling("granite_docling", _granite_docling, dynamic_size=True),
    Qwen3VL("cohere_compass", _cohere_compass, supports_video=True, dynamic_size=True),
    OneFrame("cosmos3_edge", _cosmos3_edge, dynamic_size=True),
    Qwen3VL("cosmos3_omni", _cosmos3_omni, supports_video=True, dynamic_size=True),
    NoTypes("hyperclovax_vision_v2", _hyperclovax, supports_video=True, dynamic_size=True),
    Kimi("kimi_k25", _kimi_k25, dynamic_size=True),
    NoTypes("muse_glimmer", _muse_glimmer, dynamic_size=True),
    MuseSpark("muse_spark", _muse_spark, dynamic_size=True),
    Step("step3p7", _step3p7),
    Pixtral("lighton_ocr", _lighton_ocr, dynamic_size=True),
    DeepseekOcr2("deepseek_ocr2", _deepseek_ocr2, multi_image=False),
    PerceptionLM("perception_lm", _perception_lm),
    FastVlm("fast_vlm", _fast_vlm),
]
