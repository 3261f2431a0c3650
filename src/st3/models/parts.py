"""The modules of a model that the engine hooks into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from st3.errors import UnsupportedModelError

STATES = ("linear_attention", "conv")
"""Types of layers with a state of all tokens before, in place of softmax attention."""

ALONE = ("moe", "mlp")
"""Types of layers in which no token sees another one."""

INDEXED = ("indexed_attention", "minimax_m3_sparse")
"""Types of layers with softmax attention in which an index chooses the keys that each query sees,
by their columns in the cache."""

_ATTENTIONS = ("self_attn", "mixer")
_MIXERS = (*_ATTENTIONS, "linear_attn", "conv")


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
            None where it has a state, or where no token sees another one.
        places: whether layers ask for the original place of each token (``position_ids``).
        streams_last: whether hidden states are several streams [B, T, streams, D].
        pads: whether rows of a batch may be padded.
    """

    inner: Any
    text: Any
    layers: tuple[Any, ...]
    attentions: tuple[Any, ...]
    windows: tuple[int | None, ...]
    kinds: tuple[str, ...] = ()
    sources: tuple[int | None, ...] = ()
    places: bool = False
    streams_last: bool = False
    pads: bool = True

    @property
    def in_order(self) -> bool:
        """Whether caches must hold tokens in the order of the sequence."""
        return any(kind in INDEXED for kind in self.kinds)

    @property
    def borrows(self) -> tuple[bool, ...]:
        """For each layer whether it goes by what the index of an earlier one chose, by column."""
        return tuple(bool(getattr(module, "skip_topk", False)) for module in self.attentions)

    @property
    def softmax(self) -> dict[int, Any]:
        """The softmax attentions by decoder layer."""
        return {i: module for i, module in enumerate(self.attentions) if module is not None}

    @property
    def mixers(self) -> tuple[Any, ...]:
        """The softmax attention of each layer, or the module with a state in its place; None where
        no token sees another one."""
        return tuple(
            None if kind in ALONE else _first_of(layer, _MIXERS)
            for layer, kind in zip(self.layers, self.kinds, strict=True)
        )


def _first_of(layer: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


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

    Args:
        text: the module that holds the decoder layers.
        inner: the module around it and the vision tower.
        model_type: for the error's message.

    Raises:
        UnsupportedModelError: for layers of a kind that is not known.
    """
    count = text.config.num_hidden_layers
    layers = tuple(text.layers[:count])
    types = getattr(text.config, "layer_types", None) or [None] * count
    attentions = tuple(
        None if kind in (*STATES, *ALONE) else _first_of(layer, _ATTENTIONS)
        for layer, kind in zip(layers, types, strict=False)
    )
    for attention, kind in zip(attentions, types, strict=False):
        if kind not in (*STATES, *ALONE) and not hasattr(attention, "layer_idx"):
            raise UnsupportedModelError(
                f"{model_type} has decoder layers that are neither softmax attention nor a state "
                "of a kind that is known"
            )
    if all(attention is None for attention in attentions):
        raise UnsupportedModelError(f"{model_type} has no softmax attention to rank tokens by")
    kinds, windows = _kinds(text.config, attentions)
    return Parts(inner, text, layers, attentions, windows, kinds, _sources(attentions, kinds))


def _sources(attentions: tuple[Any, ...], kinds: tuple[str, ...]) -> tuple[int | None, ...]:
    """The layer whose KV entries each layer reads; one that shares reads those of the last layer of
    its kind that has its own."""
    sources: list[int | None] = []
    latest: dict[str, int] = {}
    for index, (attention, kind) in enumerate(zip(attentions, kinds, strict=True)):
        if attention is not None and not getattr(attention, "is_kv_shared_layer", False):
            latest[kind] = index
        sources.append(None if attention is None else latest[kind])
    return tuple(sources)


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
        elif kind == "full_attention" or kind in (*STATES, *ALONE, *INDEXED):
            window = None
        else:
            raise UnsupportedModelError(f"decoder layers of type {kind!r} are not supported")
        kinds.append(kind)
        windows.append(window)
    return tuple(kinds), tuple(windows)
