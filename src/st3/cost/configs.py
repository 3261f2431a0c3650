"""The published dimensions of well-known models, as transformers configs without weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)


def _clip(**changes: Any) -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels: 576 patches."""
    large = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    return CLIPVisionConfig(**{**large, **changes})


VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layers": 32,
    "heads": 32,
}
VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "layers": 40,
    "heads": 40,
}


def _vicuna(*, layers: int, heads: int, vocab_size: int = 32064, **sizes: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        **sizes,
    )


def llava(sizes: dict[str, int], family: type[PreTrainedConfig] = LlavaConfig) -> PreTrainedConfig:
    """LLaVA-1.5 or LLaVA-NeXT: CLIP and a Vicuna of these sizes."""
    return family(
        vision_config=_clip(),
        text_config=_vicuna(**sizes),
        image_token_index=32000,
        image_seq_length=576,
    )


def cpu_308m() -> LlavaConfig:
    """308 M weights in 24 decoder layers; a tower and a vocabulary small enough not to matter."""
    return LlavaConfig(
        vision_config=_clip(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=256,
        ),
        text_config=_vicuna(
            hidden_size=1024, intermediate_size=2816, layers=24, heads=16, vocab_size=1024
        ),
        image_token_index=1000,
        image_seq_length=576,
    )


QWEN2_5_3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}
QWEN2_5_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def qwen2_5_vl(text: dict[str, int], tied: bool = False) -> Qwen2_5_VLConfig:
    """Around a text model of these sizes; ``tied``: the output layer shares the embeddings."""
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
        },
        text_config={
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [16, 24, 24],
                "rope_theta": 1e6,
            },
            **text,
        },
        tie_word_embeddings=tied,
    )


def qwen3_vl_8b() -> Qwen3VLConfig:
    """With image features added to the first three layers (DeepStack)."""
    return Qwen3VLConfig(
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        text_config={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
                "rope_theta": 5e6,
            },
        },
        tie_word_embeddings=False,
    )


def internvl3_8b() -> InternVLConfig:
    """InternViT-300M at 448 pixels and Qwen2.5-7B."""
    return InternVLConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "attention_bias": True,
        },
        text_config=Qwen2Config(
            vocab_size=151674,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
        ),
        image_token_id=151667,
        tie_word_embeddings=False,
    )


def gemma_3_4b() -> Gemma3Config:
    """SigLIP-So400m at 896 pixels; five of six layers have a window of 1024 tokens."""
    return Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": 262208,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
        },
        mm_tokens_per_image=256,
    )


def smolvlm_2b() -> SmolVLMConfig:
    """SmolVLM2-2.2B: SigLIP-So400m at 384 pixels (81 tokens a tile) and SmolLM2-1.7B."""
    return SmolVLMConfig(
        vision_config={
            "model_type": "smolvlm_vision",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        text_config=LlamaConfig(
            vocab_size=49280,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            max_position_embeddings=8192,
        ),
        scale_factor=3,
        image_token_id=49190,
    )
