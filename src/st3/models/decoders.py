"""Text decoders whose cost has a closed form, and what else differs between decoders.

A decoder may stand in several families (LLaVA runs on LLaMA, Mistral, Qwen2 ...), so that this goes
by the type of the text config. What is not here is counted (:mod:`st3.cost.count`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from st3.cost.dims import LayerDims, Lookahead, TextDims

# Decoders whose MLP has three matrices (gate, up, down) and those with two (up, down). Other
# layouts (recurrent layers, latent attention, cross-attention) cost something else: refused.
_GATED = {
    "cohere2",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4v_text",
    "glm_ocr_text",
    "granite",
    "hunyuan_vl_text",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "molmo2_text",
    "olmo2",
    "paddleocr_vl_text",
    "phi3",
    "qwen2",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_text",
    "smollm3",
}
_PLAIN = {"phi", "starcoder2"}
_QWEN_MIXTURES = {"qwen2_moe", "qwen3_moe", "qwen3_omni_moe_text", "qwen3_vl_moe_text"}
_MIXTURES = {"glm4v_moe_text", "mixtral"} | _QWEN_MIXTURES
DESCRIBED = tuple(sorted(_GATED | _PLAIN | _MIXTURES))
"""Types of the text decoders that have a closed form; tests compare each with FlopCounterMode."""

# Decoders, by the start of their type, that rotate queries and keys in some layers only, or norm
# them behind the rotation.
PARTLY_ROTATED = ("cohere2", "exaone", "hunyuan", "llama4", "muse", "smollm3")


def closed_form(config: Any, lookahead: Callable[[Any, int | None], Lookahead]) -> TextDims | None:
    """The dimensions of a decoder, from the config of its model; None for one that has no closed
    form.

    Args:
        lookahead: of the text config and a layer's window: what a token of that layer may see.

    Raises:
        ValueError: layers whose cost is not described.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type not in DESCRIBED or getattr(text, "num_kv_shared_layers", None):
        return None
    per_layer = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    windows = windows_of(text)
    return TextDims(
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        layers=tuple(
            _layer(text, per_layer[i], i, window, lookahead(text, window))
            for i, window in enumerate(windows)
        ),
        inputs=text.hidden_size * text.num_hidden_layers * _per_layer_input(text),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def windows_of(text: Any) -> list[int | None]:
    """The sliding window of each layer; None where a layer sees everything."""
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"]
        types *= text.num_hidden_layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"{text.model_type}: no cost model for layers of type {sorted(unknown)}")
    return [window if kind == "sliding_attention" else None for kind in types]


def _layer(text: Any, own: Any, index: int, window: int | None, lookahead: Lookahead) -> LayerDims:
    """``own`` is ``text`` with the overrides of this layer."""
    kind, hidden, heads = text.model_type, text.hidden_size, own.num_attention_heads
    kv_heads = own.num_key_value_heads or heads
    head_dim = getattr(own, "head_dim", None) or hidden // heads
    # Gemma 4 may use the keys as values, in the layers that see everything
    shared_kv = getattr(text, "attention_k_eq_v", False) and window is None
    layer = LayerDims(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        projections=hidden * head_dim * (2 * heads + (1 if shared_kv else 2) * kv_heads),
        dense=2 * hidden * _per_layer_input(text),
        window=window,
        lookahead=lookahead,
    )
    sparse = _is_sparse(text, index)
    if not sparse or kind == "gemma4_text":  # Gemma 4 has both, side by side
        matrices = 2 if kind in _PLAIN else 3
        layer = replace(layer, dense=layer.dense + matrices * hidden * own.intermediate_size)
    return _with_experts(layer, text) if sparse else layer


def _per_layer_input(text: Any) -> int:
    """Width of the input that Gemma 4 gives each layer besides the hidden states."""
    return int(getattr(text, "hidden_size_per_layer_input", 0) or 0)


def _is_sparse(text: Any, index: int) -> bool:
    """Whether layer ``index`` is a mixture of experts."""
    kind = text.model_type
    if kind == "gemma4_text":
        return bool(text.enable_moe_block)
    if kind == "glm4v_moe_text":
        return bool(index >= text.first_k_dense_replace)
    if kind in _QWEN_MIXTURES:
        every_nth = (index + 1) % text.decoder_sparse_step == 0
        return every_nth and text.num_experts > 0 and index not in (text.mlp_only_layers or ())
    return bool(kind == "mixtral")


def _with_experts(layer: LayerDims, text: Any) -> LayerDims:
    hidden = text.hidden_size
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    experts = getattr(text, "num_local_experts", None) or text.num_experts
    per_token = getattr(text, "top_k_experts", None) or text.num_experts_per_tok
    always = hidden * experts  # the router
    always += 3 * hidden * width * (getattr(text, "n_shared_experts", 0) or 0)
    if text.model_type == "qwen2_moe":  # one shared expert and its gate
        always += 3 * hidden * text.shared_expert_intermediate_size + hidden
    return replace(
        layer,
        dense=layer.dense + always,
        expert=3 * hidden * width,
        experts=experts,
        experts_per_token=per_token,
    )
