"""Models with images of one size in front of a LLaMA-like decoder."""

from __future__ import annotations

import logging

import torch
import transformers as tr
from transformers import PreTrainedConfig, PreTrainedModel

from .base import IMAGE, VISION_END, VISION_START, I, Vision, pixels, text, vision
from .llava import FixedSize, siglip


class Wrapped(FixedSize):
    """Start and end tokens around the image."""

    before, after = (VISION_START,), (VISION_END,)


class Big(Wrapped):
    """64 patches, of which a pixel shuffle makes 16 tokens."""

    side, tokens = 32, 16


class Llama4(Big):
    """transformers 5.24.0's own forward fails: it asks its text model for ``image_outputs``."""

    @property
    def available(self) -> bool:
        return super().available and tr.__version__ != "5.24.0"


def _ovis2() -> PreTrainedConfig:
    from transformers.models.ovis2.configuration_ovis2 import Ovis2Config, Ovis2VisionConfig

    return Ovis2Config(
        vision_config=vision(Ovis2VisionConfig, vocab_size=40, hidden_stride=1),
        text_config=text(tr.Qwen2Config),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[VISION_START, VISION_END, 16, 17, 18],
        hidden_size=32,
        vocab_size=120,
        tie_word_embeddings=False,
    )


def _llama4() -> PreTrainedConfig:
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig, Llama4VisionConfig

    return tr.Llama4Config(
        vision_config=vision(
            Llama4VisionConfig,
            image_size=32,
            pixel_shuffle_ratio=0.5,
            intermediate_size=64,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        text_config=text(
            Llama4TextConfig,
            intermediate_size_mlp=48,
            attention_chunk_size=16,
            num_experts_per_tok=1,
        ),
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _deepseek_vl() -> PreTrainedConfig:
    return tr.DeepseekVLConfig(
        vision_config=siglip(16),
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


class DeepseekHybrid(FixedSize):
    """A second tower sees the same image at a higher resolution."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        tensors = {
            "pixel_values": pixels(1, 3, 16, 16, rng=rng),
            "high_res_pixel_values": pixels(1, 3, 128, 128, rng=rng),
        }
        return Vision([IMAGE] * 16, tensors)


def _deepseek_vl_hybrid() -> PreTrainedConfig:
    return tr.DeepseekVLHybridConfig(
        vision_config=siglip(16),
        high_res_vision_config=vision(
            tr.SamVisionConfig,
            image_size=128,
            patch_size=8,
            window_size=4,
            output_channels=16,
            global_attn_indexes=[1],
            mlp_dim=24,
            num_pos_feats=8,
        ),
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


class Janus(Wrapped):
    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        # Its own generate() passes arguments in a way that the library calls deprecated.
        logging.getLogger("transformers.generation.utils").addFilter(
            lambda record: "guidance_scale" not in record.getMessage()
        )


def _janus() -> PreTrainedConfig:
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    return tr.JanusConfig(
        vision_config=vision(JanusVisionConfig, num_image_tokens=16, mlp_ratio=2.0),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=8,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=4,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _qianfan() -> PreTrainedConfig:
    from transformers.models.qianfan_ocr.configuration_qianfan_ocr import QianfanOCRVisionConfig

    return tr.QianfanOCRConfig(
        vision_config=vision(QianfanOCRVisionConfig, image_size=32),
        text_config=text(tr.Qwen3Config),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


FAMILIES = [
    Wrapped("ovis2", _ovis2),
    Llama4("llama4", _llama4),
    FixedSize("deepseek_vl", _deepseek_vl),
    DeepseekHybrid("deepseek_vl_hybrid", _deepseek_vl_hybrid),
    Janus("janus", _janus),
    Big("qianfan_ocr", _qianfan),
]
