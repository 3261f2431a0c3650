"""The states of single rows, and the layers of a cache that hold them for a joined batch.

A layer with a state (linear attention, a convolution) holds as much of a row of any length, so that
rows which began at different times lie one behind the other, and nothing has to be aligned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_TENSORS = ("conv_states", "recurrent_states")  # number of the state -> [B, ...], or None


class RowState:
    """What one row holds in one layer that has no KV entries of its own: a state, or nothing where
    the layer reads another one's entries.

    Args:
        layer: of a cache, with one row.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer


def has_state(layer: Any) -> bool:
    """Whether a layer of a cache is one with a state."""
    return hasattr(layer, "conv_states")


def state_bytes(layer: Any) -> int:
    """Bytes of the states of all rows that a layer of a cache holds."""
    return sum(
        held.nbytes
        for name in _TENSORS
        for held in getattr(layer, name, {}).values()
        if held is not None
    )


def joined(rows: Sequence[RowState]) -> Any:
    """A layer of a cache that holds these rows, in this order."""
    return _with_tensors(rows[0].layer, lambda name, i: torch.cat([_of(r, name, i) for r in rows]))


def row_of(layer: Any, row: int) -> RowState:
    """A copy of one row's state."""
    return RowState(
        _with_tensors(layer, lambda name, i: getattr(layer, name)[i][row : row + 1].clone())
    )


def place(layer: Any, row: int, state: RowState) -> None:
    """Write a row's state over that of the row ``row``. Changes the layer."""
    for name in _TENSORS:
        for i, held in getattr(layer, name, {}).items():
            if held is not None:
                held[row] = _of(state, name, i)[0]


def _of(row: RowState, name: str, i: int) -> Tensor:
    found: Tensor = getattr(row.layer, name)[i]
    return found


def _with_tensors(layer: Any, make: Callable[[str, int], Tensor]) -> Any:
    """A layer of the same kind with other tensors."""
    fresh = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(fresh, name, dict(value))
    for name in _TENSORS:
        if hasattr(layer, name):
            held = getattr(layer, name)
            setattr(fresh, name, {i: None if t is None else make(name, i) for i, t in held.items()})
    return fresh
