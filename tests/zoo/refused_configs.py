"""Tiny configs of the families that are refused."""

from __future__ import annotations

from typing import Any

import transformers as tr
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .base import IMAGE, text, tiny, vision
from .gemma4 import IDS as GEMMA_IDS
from .qwen import GLM_IDS
from .sam import SAM

IDS = {"image_token_id": IMAGE, "tie_word_embeddings": False}


LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


SMALL: dict[str, Any] = {  # names of the older configs
    "vocab_size": 120,
    "hidden_size": 32,
    "d_model": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_kv": 8,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "layers": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sub(config: str, name: str) -> type[PreTrainedConfig]:
    found = CONFIG_MAPPING[config]().sub_configs[name]
    return (
        type(getattr(CONFIG_MAPPING[config](), name)) if found.__name__ == "AutoConfig" else found
    )


def _small(model_type: str, **changes: Any) -> PreTrainedConfig:
    return tiny(CONFIG_MAPPING[model_type], SMALL, **changes)


def mllama() -> PreTrainedConfig:
    return tr.MllamaConfig(
        vision_config=vision(
            sub("mllama", "vision_config"),
            attention_heads=2,
            num_global_layers=1,
            vision_output_dim=32,
            intermediate_layers_indices=[0],
            max_num_tiles=2,
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        text_config=text(sub("mllama", "text_config"), cross_attention_layers=[1, 3]),
        image_token_index=IMAGE,
    )


def idefics() -> PreTrainedConfig:
    return _small(
        "idefics",
        vision_config={"embed_dim": 16, "image_size": 16, "patch_size": 4, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "intermediate_size": 16},
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 8},
    )  # fmt: skip


def florence2() -> PreTrainedConfig:
    return tr.Florence2Config(
        vision_config={"depths": [1], "patch_size": [7], "patch_stride": [4], "patch_padding": [3],
                       "patch_prenorm": [False], "embed_dim": [16], "num_heads": [2],
                       "num_groups": [2], "projection_dim": 32},
        text_config={"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
                     "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                     "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 120,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        image_token_id=IMAGE,
    )  # fmt: skip


def blip() -> PreTrainedConfig:
    return tr.BlipConfig(
        text_config={**SMALL, "encoder_hidden_size": 16, "projection_dim": 32},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
    )  # fmt: skip


def kosmos2() -> PreTrainedConfig:
    return tr.Kosmos2Config(
        text_config={k: v for k, v in SMALL.items() if k in
                     ("vocab_size", "embed_dim", "layers", "ffn_dim", "attention_heads")},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        latent_query_num=8,
    )  # fmt: skip


def kosmos2_5() -> PreTrainedConfig:
    return tr.Kosmos2_5Config(
        text_config={k: v for k, v in SMALL.items() if k in
                     ("vocab_size", "embed_dim", "layers", "ffn_dim", "attention_heads")},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "head_dim": 8, "patch_embed_hidden_size": 48},
        latent_query_num=8,
    )  # fmt: skip


def pix2struct() -> PreTrainedConfig:
    return tr.Pix2StructConfig(
        text_config={k: v for k, v in SMALL.items() if k in
                     ("vocab_size", "hidden_size", "d_kv", "d_ff", "num_layers", "num_heads")},
        vision_config={"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 16, "d_kv": 8,
                       "num_hidden_layers": 1, "num_attention_heads": 4},
    )  # fmt: skip


def t5gemma2() -> PreTrainedConfig:
    part = {"query_pre_attn_scalar": 8, "sliding_window": 16, "num_hidden_layers": 2}
    encoder, decoder = sub("t5gemma2", "encoder"), sub("t5gemma2", "decoder")
    return tr.T5Gemma2Config(
        encoder=encoder(
            text_config=text(sub("t5gemma2", "decoder"), **part).to_dict()
            | {"model_type": "t5gemma2_text"},
            vision_config=vision(tr.SiglipVisionConfig),
            mm_tokens_per_image=16,
            image_token_index=IMAGE,
        ),
        decoder=text(decoder, **part),
        image_token_index=IMAGE,
    )


def git() -> PreTrainedConfig:
    return _small("git", vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=4))  # fmt: skip


def vision_encoder_decoder() -> PreTrainedConfig:
    return tr.VisionEncoderDecoderConfig(
        encoder=vision(tr.ViTConfig).to_dict() | {"model_type": "vit"},
        decoder=_small("bert", is_decoder=True, add_cross_attention=True).to_dict()
        | {"model_type": "bert"},
    )


def udop() -> PreTrainedConfig:
    return _small("udop", num_decoder_layers=2, image_size=16, patch_size=4)


def latent(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Latent attention with a sparse index."""
    return text(
        sub(model_type, "text_config"),
        **{
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "index_topk": 16,
            "index_head_dim": 8,
            "index_n_heads": 2,
            **changes,
        },
    )


def glm5_next() -> PreTrainedConfig:
    return tr.Glm5NextConfig(
        vision_config=vision(sub("glm5_next", "vision_config"), projection_intermediate_size=16),
        text_config=latent(
            "glm5_next",
            head_dim=0,
            qk_rope_head_dim=0,
            index_kpool=4,
            linear_head_dim=8,
            linear_num_heads=4,
            layer_types=LINEAR["layer_types"],
        ),
        **GLM_IDS,
    )


def unlimited_ocr() -> PreTrainedConfig:
    encoder = sub("unlimited_ocr", "vision_config")
    return tr.UnlimitedOcrConfig(
        vision_config=encoder(
            sam_config={**SAM, "hidden_size": 16, "num_attention_heads": 2,
                        "downsample_channels": [16, 16]},
            encoder_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        ),
        text_config=text(sub("unlimited_ocr", "text_config"), sliding_window=16),
        **IDS,
    )  # fmt: skip


def diffusion_gemma() -> PreTrainedConfig:
    return tr.DiffusionGemmaConfig(
        vision_config={"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 24,
                       "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                       "head_dim": 8, "patch_size": 4, "position_embedding_size": 32},
        text_config=text(
            sub("diffusion_gemma", "text_config"),
            sliding_window=16,
            top_k_experts=2,
            global_head_dim=16,
        ),
        canvas_length=8,
        **{k: v for k, v in GEMMA_IDS.items() if k in ("image_token_id", "boi_token_id",
                                                       "eoi_token_id")},
    )  # fmt: skip
