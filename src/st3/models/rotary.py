"""Taking RoPE off queries and keys again, for scores that rank without positions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from st3.errors import UnsupportedModelError
from st3.models.decoders import PARTLY_ROTATED
from st3.models.parts import Parts

# Of queries, keys and the layer's position tables: both without RoPE.
Unrotate = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


def inverse_rotation(parts: Parts) -> Unrotate:
    """A function of queries [B, heads, N, size], keys [B, KV heads, N, size] and the layer's
    position tables (cos and sin) that returns both unrotated.

    A rotation is undone by the family's own function with the sine turned round; tables that also
    scale (YaRN) are divided by their squared length.

    Raises:
        UnsupportedModelError: a decoder that rotates in another way, or not in all layers.
    """
    attention = next(iter(parts.softmax.values()))
    kind = type(attention)
    apply = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
    # Multi-head latent attention, and those that count rotary dimensions, rotate a part of a head.
    part = hasattr(attention, "kv_b_proj") or hasattr(attention, "rotary_ndims")
    part = part or parts.text.config.model_type.startswith(PARTLY_ROTATED)
    if apply is None or not _takes_tables(apply) or part:
        raise UnsupportedModelError(
            f"{kind.__name__} rotates queries and keys in a way of its own, which st3 cannot undo: "
            "rank by another score, such as score=attention"
        )

    def unrotate(query: Tensor, key: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(tables, (tuple, list)) or len(tables) != 2:
            raise UnsupportedModelError(
                f"{kind.__name__} got no tables of cosines and sines, so its rotation cannot be "
                "undone: rank by another score, such as score=attention"
            )
        cos, sin = tables
        square = cos * cos + sin * sin
        unrotated: tuple[Tensor, Tensor] = apply(query, key, cos / square, -sin / square)
        return unrotated

    return unrotate


def _takes_tables(apply: Callable[..., Any]) -> bool:
    return list(inspect.signature(apply).parameters)[:4] == ["q", "k", "cos", "sin"]
