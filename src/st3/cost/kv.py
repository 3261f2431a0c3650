"""Bytes: of the KV cache, live and allocated, and of what a decode step reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .dims import TextDims
from .flops import Schedule, check, read

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

AllocationRule = Callable[[Sequence[int]], int]
"""Live entries of a layer after the prefill and after each decode step so far -> entries that its
buffer has room for now."""


def bytes_per_value(dtype: Any) -> int:
    """Bytes of one number of ``dtype``: a torch dtype or its name ("bfloat16", "bf16", ...)."""
    name = str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in _BYTES:
        known = ", ".join([*_BYTES, *_SHORT])
        raise ValueError(f"unknown dtype {dtype!r}: use one of {known}")
    return _BYTES[name]


def kv_entries(
    dims: TextDims,
    n_text: int,
    n_visual: int,
    schedule: Schedule | None = None,
    step: int = 0,
    *,
    windows: bool = True,
) -> list[int]:
    """Live KV entries of each layer: what a later step can still see.

    Args:
        dims, n_text, n_visual, schedule: as for :func:`~st3.cost.flops.prefill_flops`.
        step: decode steps so far; 0: after the prefill.
        windows: count at most ``window - 1`` entries in a layer with a sliding window, as
            transformers' DynamicCache keeps them. False counts such layers like all others: what
            st3's own cache layers keep of prompts shorter than the window, and more than they keep
            of longer ones.

    Raises:
        ValueError: negative counts or steps, or a schedule of another number of layers.
    """
    check(dims, n_text, n_visual, schedule)
    if step < 0:
        raise ValueError(f"step counts decode steps and cannot be negative, got {step}")
    live = []
    for index, layer in enumerate(dims.layers):
        visible = n_visual if schedule is None else schedule.visible(index, n_visual, step)
        entries = n_text + visible + step
        if windows and layer.window is not None:
            entries = min(entries, layer.window - 1)
        live.append(entries)
    return live


def kv_bytes(
    dims: TextDims,
    n_text: int,
    n_visual: int,
    schedule: Schedule | None = None,
    step: int = 0,
    dtype: Any = "bfloat16",
    *,
    windows: bool = True,
) -> int:
    """Bytes of the live KV entries of one sequence: keys and values of all layers.

    Args:
        dims, n_text, n_visual, schedule, step, windows: as for :func:`kv_entries`.
        dtype: of an entry, a torch dtype or its name.

    Raises:
        ValueError: as :func:`kv_entries`, or an unknown dtype.
    """
    size = bytes_per_value(dtype)
    live = kv_entries(dims, n_text, n_visual, schedule, step, windows=windows)
    return sum(layer.held * n * size for layer, n in zip(dims.layers, live, strict=True))


def state_bytes(dims: TextDims, dtype: Any = "bfloat16", batch: int = 1) -> int:
    """Bytes of the states of the layers that have one, which no prompt makes larger and trimming
    makes no smaller: of ``batch`` rows, all numbers in ``dtype``. (transformers keeps those of
    recurrences in float32.)"""
    return batch * sum(layer.state for layer in dims.layers) * bytes_per_value(dtype)


def mean_kv_bytes(
    dims: TextDims,
    n_text: int,
    n_visual: int,
    schedule: Schedule | None = None,
    new_tokens: int = 1,
    dtype: Any = "bfloat16",
    *,
    windows: bool = True,
) -> float:
    """Mean of :func:`kv_bytes` over a generation: after the prefill, which gives the first token,
    and after each of the ``new_tokens - 1`` decode steps.

    Args:
        dims, n_text, n_visual, schedule, dtype, windows: as for :func:`kv_bytes`.
        new_tokens: at least 1.

    Raises:
        ValueError: as :func:`kv_bytes`, or no new token.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    held = (
        kv_bytes(dims, n_text, n_visual, schedule, step, dtype, windows=windows)
        for step in range(new_tokens)
    )
    return sum(held) / new_tokens


def kv_allocated_bytes(
    dims: TextDims,
    n_text: int,
    n_visual: int,
    schedule: Schedule | None = None,
    step: int = 0,
    dtype: Any = "bfloat16",
    *,
    rule: AllocationRule,
    windows: bool = True,
) -> int:
    """Bytes of the buffers that hold the live KV entries of one sequence.

    Args:
        dims, n_text, n_visual, schedule, step, dtype, windows: as for :func:`kv_bytes`.
        rule: how a cache allocates: :func:`as_needed` (DynamicCache), :func:`with_headroom` (st3).
    """
    size = bytes_per_value(dtype)
    history = [
        kv_entries(dims, n_text, n_visual, schedule, s, windows=windows) for s in range(step + 1)
    ]
    return sum(
        layer.held * rule([live[index] for live in history]) * size
        for index, layer in enumerate(dims.layers)
    )


def as_needed(live: Sequence[int]) -> int:
    """DynamicCache makes the tensors of every step anew."""
    return live[-1]


def with_headroom(columns: int | Callable[[int], int]) -> AllocationRule:
    """A buffer with ``columns`` entries to spare that is copied when it is full: the copy takes
    what is live then and as many more, so that annealed entries are given back only then. A
    function says what is allocated for so many live ones; with
    :func:`st3.engine.kv.layout.capacity_for` this is how st3's cache layers allocate."""
    if not callable(columns) and columns < 0:
        raise ValueError(f"headroom cannot be negative, got {columns}")

    def capacity(live: int) -> int:
        return columns(live) if callable(columns) else live + columns

    def rule(live: Sequence[int]) -> int:
        if len(live) == 1:
            return live[0]  # a prompt is written when the first further token comes
        used, room = live[0], capacity(live[0])
        for now in live[1:]:
            used += 1  # entries are appended; what annealing hides is kept in the buffer
            if used > room:
                used, room = now, capacity(now)
        return room

    return rule


def decode_bytes(
    dims: TextDims,
    n_text: int,
    n_visual: int,
    schedule: Schedule | None = None,
    step: int = 1,
    dtype: Any = "bfloat16",
    batch: int = 1,
) -> int:
    """Bytes that decode step ``step`` must read: every weight matrix of the decoder and the head
    once, and the KV entries that attention sees and the states, for each of ``batch`` equal rows.

    Of a mixture of experts, at most ``batch * experts_per_token`` different experts are read.

    Args:
        dims, n_text, n_visual, schedule, step: as for :func:`~st3.cost.flops.decode_flops`.
        dtype: of weights and entries.
        batch: rows of the step.
    """
    check(dims, n_text, n_visual, schedule)
    size = bytes_per_value(dtype)
    weights = dims.inputs + dims.lm_head + sum(layer.weights(batch) for layer in dims.layers)
    keys = read(dims, n_text, n_visual, schedule, step)
    entries = sum(layer.entry * n for layer, n in zip(dims.layers, keys, strict=True))
    states = sum(layer.state for layer in dims.layers)
    return (weights + batch * (entries + states)) * size
