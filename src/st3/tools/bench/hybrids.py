"""Shapes of decoders whose layers are not all alike, small enough for a CPU."""

from __future__ import annotations

from functools import partial

import transformers
from transformers import PreTrainedConfig

from st3.cost.shapes import Shape

IMAGE = 10  # the token id; the vocabulary has no other use


def qwen3_5(hidden: int, vocab: int = 4096) -> PreTrainedConfig:
    """Qwen3.5's layout: 16 layers, of which every fourth has softmax attention, the others linear
    attention."""
    return transformers.Qwen3_5Config(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": hidden // 6,
            "linear_key_head_dim": hidden // 12,
            "linear_value_head_dim": hidden // 12,
            "linear_num_key_heads": 6,
            "linear_num_value_heads": 12,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [hidden // 48 - 2 * (hidden // 144), hidden // 144, hidden // 144],
                "partial_rotary_factor": 0.25,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": hidden,
        },
        image_token_id=IMAGE,
    )


def gemma4(hidden: int, vocab: int = 4096) -> PreTrainedConfig:
    """The layout of Gemma 4's E models: 16 layers, of which the last 8 share the KV entries of
    earlier ones; three of four have a sliding window."""
    return transformers.Gemma4Config(
        text_config={
            "vocab_size": vocab,
            "vocab_size_per_layer_input": vocab,
            "hidden_size": hidden,
            "hidden_size_per_layer_input": 32,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": hidden // 8,
            "global_head_dim": hidden // 8,
            "num_kv_shared_layers": 8,
            "sliding_window": 512,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 4,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        image_token_id=IMAGE,
    )


_LINEAR = "16 layers, 12 of them linear attention"
_SHARED = "16 layers, the last 8 share KV entries"
_ALL = {
    "Qwen3_5Config": (
        Shape("cpu-qwen3.5", partial(qwen3_5, 768), 1152, note=_LINEAR),
        Shape("tiny-qwen3.5", partial(qwen3_5, 144, 128), 24, text_tokens=8, note=_LINEAR),
    ),
    "Gemma4Config": (
        Shape("cpu-gemma4-shared", partial(gemma4, 512), 1152, note=_SHARED),
        Shape("tiny-gemma4-shared", partial(gemma4, 64, 128), 24, text_tokens=8, note=_SHARED),
    ),
}
SHAPES = {
    shape.name: shape
    for config, shapes in _ALL.items()
    if hasattr(transformers, config)  # the oldest transformers lack some
    for shape in shapes
}
