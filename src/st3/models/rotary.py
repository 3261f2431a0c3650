"""Taking RoPE off queries and keys again, for scores that rank without positions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from st3.errors import UnsupportedModelError

# Of queries, keys and the layer's position tables: both without RoPE.
Unrotate = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]

# Attention modules that rotate in some layers only, or norm queries and keys behind the rotation.
_PARTLY = ("Cohere2", "Exaone4", "SmolLM3", "Llama4", "HunYuan", "Muse")


def inverse_rotation(attentions: Sequence[nn.Module]) -> Unrotate:
    """A function of queries [B, heads, N, size], keys [B, KV heads, N, size] and the layer's
    position tables (cos and sin) that returns both unrotated.

    A rotation is undone by the family's own function with the sine turned round; tables that also
    scale (YaRN) are divided by their squared length.

    Raises:
        UnsupportedModelError: a family that rotates in another way, or not in all layers.
    """
    kind = type(attentions[0])
    apply = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
    # Multi-head latent attention, and those that count rotary dimensions, rotate a part of a head.
    part = hasattr(attentions[0], "kv_b_proj") or hasattr(attentions[0], "rotary_ndims")
    if apply is None or not _takes_tables(apply) or part or kind.__name__.startswith(_PARTLY):
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
