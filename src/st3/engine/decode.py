"""Attention of a single query per row over the dense KV buffers, for CPUs.

torch's sdpa reads the keys and values of a single query at a fraction of the speed of memory. Both
of its products are sums of weighted rows: of values by the softmax's weights, and, if keys lie
*size first* (:mod:`st3.engine.kv.layout`), of keys by the query. ``embedding_bag`` computes just
that and sums in fp32. Queries that share a KV head are bags of the same rows, which are then still
in the processor's cache. benchmarks/results/decode-attention.md has the time of each way, for
multi-head and grouped-query shapes; what follows from it is said in :func:`wants_size_first`.

Trimmed and untrimmed runs on st3's cache both come here, so that the gain is never sold as
trimming.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # has a fast embedding_bag


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention of one query per row.

    Args:
        query: [B, heads, 1, size].
        key, value: [B, KV heads, K, size], views of a buffer allowed; keys in either layout.
        attention_mask: [B or 1, 1, 1, K] bool, or None.

    Returns:
        [B, 1, heads, size], None.
    """
    bags = not torch.is_grad_enabled() and query.dtype == key.dtype == value.dtype
    if bags and _size_rows(key):
        logits = bag_logits(query, key, scaling)
    else:
        logits = matmul_logits(query, key, scaling)
    weights = _softmax(logits, attention_mask)
    output = bag_output if bags and _column_rows(value) else matmul_output
    return output(weights, value), None


def matmul_decode(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same as two matrix products, whatever the layout: for compiled graphs."""
    weights = _softmax(matmul_logits(query, key, scaling), attention_mask)
    return matmul_output(weights, value), None


def applies(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether :func:`decode_attention` can stand in for sdpa, and is the faster of the two."""
    return (
        query.shape[2] == 1
        and _has_bags(query)
        and (query.dtype in HALVES or query.dtype == torch.float32)
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and kwargs.get("position_bias") is None
        and kwargs.get("s_aux") is None
    )


def wants_size_first(states: Tensor) -> bool:
    """Whether keys such as these are to lie size first, however many queries share them. In fp32
    too bags are the fastest for short prompts, but keys as they come are near, for long ones with
    shared keys ahead, and written several times as fast."""
    return _has_bags(states) and states.dtype in HALVES


def bag_logits(query: Tensor, key: Tensor, scaling: float | None = None) -> Tensor:
    """Scaled products [B, heads, 1, K] with keys that lie size first, as sums of rows."""
    batch, heads, _, size = query.shape
    kv_heads, columns = key.shape[1:3]
    capacity = key.stride(3)
    # Each of the head size's places is a row, over all columns of the buffer.
    first = key.storage_offset() % capacity
    table = key.as_strided(
        (batch * kv_heads * size, capacity), (capacity, 1), key.storage_offset() - first
    )
    bags = _bags(batch * kv_heads, heads // kv_heads, size, size)
    found = _weighted_rows(table, bags, _scaled(query, scaling))
    return found.view(batch, heads, 1, capacity)[..., first : first + columns]


def matmul_logits(query: Tensor, key: Tensor, scaling: float | None = None) -> Tensor:
    """Scaled products [B, heads, 1, K] as a matrix product, for both layouts."""
    batch, heads, _, size = query.shape
    kv_heads, columns = key.shape[1:3]
    queries = _scaled(query, scaling).reshape(batch * kv_heads, -1, size)
    keys = key.flatten(0, 1)
    if key.stride(-1) == 1:
        # Long operand first: `keys @ q` is many times faster than `q @ keys^T`, and than a matmul.
        found = torch.bmm(keys, queries.transpose(1, 2)).transpose(1, 2)
    else:
        found = torch.bmm(queries, keys.transpose(1, 2))
    return found.reshape(batch, heads, 1, columns)


def bag_output(weights: Tensor, value: Tensor) -> Tensor:
    """Sums [B, 1, heads, size] of the rows of ``value`` by ``weights`` [B, heads, 1, K]."""
    batch, heads, _, columns = weights.shape
    kv_heads, size = value.shape[1], value.shape[3]
    capacity = value.stride(1) // size
    stored = (batch * kv_heads - 1) * capacity + columns
    table = value.as_strided((stored, size), (size, 1), value.storage_offset())
    bags = _bags(batch * kv_heads, heads // kv_heads, columns, capacity)
    return _weighted_rows(table, bags, weights).view(batch, 1, heads, size)


def matmul_output(weights: Tensor, value: Tensor) -> Tensor:
    """The same as a matrix product."""
    batch, heads, _, columns = weights.shape
    output = torch.matmul(weights.view(batch, value.shape[1], -1, columns), value)
    return output.view(batch, 1, heads, value.shape[-1])


def _has_bags(states: Tensor) -> bool:
    """Whether torch has a fast ``embedding_bag`` where these are."""
    return states.device.type == "cpu" and _FBGEMM


def _scaled(query: Tensor, scaling: float | None) -> Tensor:
    # Scaled are the few queries: the logits would be read and written once more.
    return query * (query.shape[-1] ** -0.5 if scaling is None else scaling)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Weights [B, heads, 1, K], in the dtype of ``logits``; torch computes them in fp32."""
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1)


def _size_rows(key: Tensor) -> bool:
    """Whether ``key`` are columns of a table whose rows are the places of the head size."""
    heads, columns, size = key.shape[1:]
    capacity = key.stride(3)
    return (
        key.stride() == (heads * size * capacity, size * capacity, 1, capacity)
        and key.storage_offset() % capacity + columns <= capacity
    )


def _column_rows(value: Tensor) -> bool:
    """Whether ``value`` are rows of a table that has as many for each head."""
    return (
        value.stride()[2:] == (value.shape[3], 1)
        and value.stride(0) == value.shape[1] * value.stride(1)
        and value.stride(1) % value.shape[3] == 0
    )


@lru_cache(maxsize=4)  # layers that keep as many tokens, one behind the other, share them
def _bags(heads: int, queries: int, width: int, stride: int) -> tuple[Tensor, Tensor]:
    """The first ``width`` of the ``stride`` rows that a table has for each head, once for each of
    the head's queries, one bag behind the other; and where each bag begins and the last one ends.
    """
    rows = _numbers(1 << (heads * stride - 1).bit_length())[: heads * stride]
    rows = rows.view(heads, 1, stride)[:, :, :width].expand(heads, queries, width)
    offsets = torch.arange(0, rows.numel() + 1, width, dtype=rows.dtype)
    return rows.reshape(-1), offsets


@lru_cache(maxsize=1)
def _numbers(count: int) -> Tensor:
    # Half the bytes of torch's usual integers: they are read along with the rows.
    return torch.arange(count, dtype=torch.int32)


def _weighted_rows(table: Tensor, bags: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """Sum of each bag's rows of ``table`` [rows, D], each times its weight: [bags, D]."""
    # What torch.nn.functional.embedding_bag calls; its checks cost as much as a short sum.
    rows, offsets = bags
    found: Tensor = torch.embedding_bag(
        table, rows, offsets, False, 0, False, weights.reshape(-1), True
    )[0]
    return found
