"""Read and write a transformers forward call and its output, whatever its version calls things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_NAMES = ("cache", "past_key_values")  # transformers 5.24 and later, and before

# What the installed transformers calls the KV cache in calls and in outputs.
CACHE = next(name for name in _NAMES if name in {f.name for f in fields(BaseModelOutputWithPast)})


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a forward call, or None."""
    for name in _NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def cache_of(output: Any) -> Any:
    """The KV cache in the output of forward() or generate(), or None."""
    return getattr(output, CACHE, None)
