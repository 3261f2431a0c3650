"""Read and write transformers' forward calls and outputs, whatever its version calls things."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from st3.engine.calls import LateFeatures, LayerInputs

if TYPE_CHECKING:
    from st3.models.parts import Parts

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 and later, and before

# What the installed transformers calls the KV cache in calls and in outputs.
CACHE = next(
    name for name in CACHE_NAMES if name in {f.name for f in fields(BaseModelOutputWithPast)}
)

_MASK, _TABLES, _IDS, _HIDDEN = (
    "attention_mask",
    "position_embeddings",
    "position_ids",
    "hidden_states",
)
_LATE, _KEEP = "deepstack_features", "logits_to_keep"


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a forward call, or None."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def with_cache(kwargs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The same keyword arguments with this KV cache."""
    return {**kwargs, CACHE: cache}


def cache_of(output: Any) -> Any:
    """The KV cache in the output of forward() or generate(), or None."""
    return getattr(output, CACHE, None)


@lru_cache(maxsize=256)  # of the classes' own forwards
def _names(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name; some families hand some on by position."""
    if not args:
        return kwargs
    names = _names(type(module).forward)[1:]  # without self
    return {**dict(zip(names, args, strict=False)), **kwargs}


# The text model -----------------------------------------------------------------------------------


def wants_cache(text: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the text model makes a cache if it is given none."""
    use_cache = kwargs.get("use_cache")
    return bool(getattr(text.config, "use_cache", False) if use_cache is None else use_cache)


def is_checkpointing(text: Any) -> bool:
    """Whether layers will run again in backward; they leave aside whatever cache they are given."""
    flags = (getattr(module, "gradient_checkpointing", False) for module in (text, text.layers[0]))
    return bool(text.training) and any(flags)


def late_features(kwargs: Mapping[str, Any]) -> LateFeatures | None:
    """Image features that a text model would add to hidden states between its layers, or None."""
    features = kwargs.get(_LATE)
    if not features:
        return None
    visual = kwargs["vision_mask"]  # [B, T] or [B, T, 1 or D]
    return LateFeatures(visual[..., 0] if visual.dim() == 3 else visual, dict(features))


def whole(kwargs: dict[str, Any], shares: bool) -> dict[str, Any]:
    """A prompt's call without what a text model does to it between its layers by columns, which are
    no longer the prompt's: late features are added by the engine.

    Args:
        shares: whether the last layers share KV entries. Text models then go on with the last
            ``logits_to_keep`` columns, which are those of a trimmed prompt only where that is 1.
    """
    keep = kwargs.get(_KEEP)
    if kwargs.get(_LATE):
        kwargs = {**kwargs, _LATE: None}
    if shares and isinstance(keep, int) and keep > 1:
        kwargs = {**kwargs, _KEEP: 0}
    return kwargs


def hidden_of(output: Any) -> Tensor:
    """The last hidden states in a text model's output, [B, T, D]."""
    found: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return found


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with these hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


# Decoder layers -----------------------------------------------------------------------------------


def is_unmasked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a decoder layer is given no mask."""
    return len(args) == 1 and kwargs.get(_MASK) is None


def layer_inputs(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parts: Parts | None = None,
) -> tuple[LayerInputs, dict[str, Any]]:
    """What a decoder layer is given, and all its arguments by name; ``parts`` of its model, if its
    layers may ask for more than others do."""
    named = kwargs if len(args) == 1 else arguments(module, args, kwargs)
    hidden = args[0] if len(args) == 1 else named[_HIDDEN]
    known = (_MASK, _TABLES, _IDS, _HIDDEN)
    others = {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and name not in known
    }
    ids = named.get(_IDS)
    if parts is not None and parts.places and ids is not None:
        others[_IDS] = ids.expand(hidden.shape[0], -1)
    if parts is not None and parts.streams_last:
        hidden = hidden.permute(2, 0, 1, 3)
    return LayerInputs(hidden, named.get(_MASK), named.get(_TABLES), others), named


def layer_arguments(
    inputs: LayerInputs, named: dict[str, Any], parts: Parts | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call that gives a decoder layer ``inputs``."""
    kwargs = {name: value for name, value in named.items() if name != _HIDDEN}
    if inputs.changed:
        # Flash attention takes jumps in batch-1 position ids for packed sequences and would cut
        # the prompt there, silently.
        kwargs |= {_MASK: inputs.mask, _IDS: None, **inputs.others}
        if inputs.tables is not None:
            kwargs[_TABLES] = inputs.tables
    hidden = inputs.hidden
    if parts is not None and parts.streams_last:
        hidden = hidden.permute(1, 2, 0, 3)
    return (hidden,), kwargs


# Compiled steps -----------------------------------------------------------------------------------


def compiled_arguments(kwargs: dict[str, Any], position: Tensor) -> dict[str, Any]:
    """The arguments of a text model's step of one token, with nothing in them that would make
    torch.compile build another graph for the next one.

    Args:
        position: [] int64, the token's logical position.
    """
    embeds, mask = kwargs["inputs_embeds"], kwargs.get(_MASK)
    # Any 4D mask is passed through to the layers, which are then given their own.
    stand_in = torch.zeros(1, 1, 1, 1, dtype=embeds.dtype, device=embeds.device)
    masks = dict.fromkeys(mask, stand_in) if isinstance(mask, dict) else stand_in
    ids = kwargs.get(_IDS)
    if ids is None:
        ids = position.expand(embeds.shape[0], 1)
    return {**kwargs, _MASK: masks, _IDS: ids}
