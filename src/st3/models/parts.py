"""The modules of a model that the engine hooks into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from st3.errors import UnsupportedModelError

STATES = ("linear_attention", "conv")
"""Types of layers with a state of all tokens before, in place of softmax attention."""


@dataclass(frozen=True)
class Parts:
    """The modules of a model that the engine hooks into.

    Attributes:
        inner: the model inside, which puts image features in their places.
        text: the text model, which runs the decoder layers.
        layers, attentions: the decoder layers, and the softmax attention of each; None where a
            layer has a state in its place.
        windows: the sliding window of each layer, in tokens; None where a layer sees everything.
        kinds: the type of each layer, as the config's ``layer_types`` has it.
        sources: the layer whose KV entries each layer reads: its own number, unless it shares;
            None where it has a state.
    """

    inner: Any
    text: Any
    layers: tuple[Any, ...]
    attentions: tuple[Any, ...]
    windows: tuple[int | None, ...]
    kinds: tuple[str, ...] = ()
    sources: tuple[int | None, ...] = ()

    @property
    def softmax(self) -> dict[int, Any]:
        """The softmax attentions by decoder layer."""
        return {i: module for i, module in enumerate(self.attentions) if module is not None}


def base_model(model: Any) -> Any:
    """The transformers model itself: a PeftModel holds it, with its adapters inside."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def find_parts(model: Any) -> Parts:
    """Find the text model, its decoder layers and their attention.

    Args:
        model: a transformers model, or a PeftModel around one.

    Raises:
        UnsupportedModelError: if the model is laid out otherwise, with the reason.
    """
    model = base_model(model)
    model_type = getattr(getattr(model, "config", None), "model_type", "this model")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{model_type} is an encoder-decoder and cannot be trimmed")
    inner = getattr(model, "model", None)
    text = getattr(inner, "language_model", None) or getattr(inner, "text_model", None)
    if text is None and hasattr(model, "get_placeholder_mask"):
        inner, text = model, inner  # transformers 5.17: the Omni thinkers are in one piece
    layers = getattr(text, "layers", None)
    if inner is None or text is None or not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no model.language_model.layers: load it with "
            "AutoModelForImageTextToText"
        )
    return decoder_parts(text, inner, model_type)


def decoder_parts(text: Any, inner: Any, model_type: str) -> Parts:
    """The parts of a text model.

    Raises:
        UnsupportedModelError: for layers of a kind that is not known.
    """
    count = text.config.num_hidden_layers
    layers = tuple(text.layers[:count])
    types = getattr(text.config, "layer_types", None) or [None] * count
    attentions = tuple(
        None if kind in STATES else getattr(layer, "self_attn", None)
        for layer, kind in zip(layers, types, strict=False)
    )
    for attention, kind in zip(attentions, types, strict=False):
        if kind not in STATES and not hasattr(attention, "layer_idx"):
            raise UnsupportedModelError(
                f"{model_type} has decoder layers that are neither softmax attention nor a state "
                "of a kind that is known"
            )
    if any(getattr(attention, "is_kv_shared_layer", False) for attention in attentions):
        raise UnsupportedModelError(
            f"this {model_type} has layers with shared KV entries, which trimming makes uneven"
        )
    kinds, windows = _kinds(text.config, attentions)
    sources = tuple(None if module is None else i for i, module in enumerate(attentions))
    if sources.count(None) == count:
        raise UnsupportedModelError(f"{model_type} has no softmax attention to rank tokens by")
    return Parts(inner, text, layers, attentions, windows, kinds, sources)


def _kinds(
    config: Any, attentions: tuple[Any, ...]
) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Type and sliding window of each decoder layer, as its attention or the config says it."""
    types = getattr(config, "layer_types", None)
    kinds: list[str] = []
    windows: list[int | None] = []
    for index, attention in enumerate(attentions):
        kind = types[index] if types else None
        if kind is None:
            window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
            kind = "full_attention" if window is None else "sliding_attention"
        elif kind == "sliding_attention":
            window = getattr(attention, "sliding_window", None) or config.sliding_window
        elif kind == "full_attention" or kind in STATES:
            window = None
        else:
            raise UnsupportedModelError(f"decoder layers of type {kind!r} are not supported")
        kinds.append(kind)
        windows.append(window)
    return tuple(kinds), tuple(windows)
