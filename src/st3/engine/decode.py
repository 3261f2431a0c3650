"""Attention of a single query over the dense KV buffers, for CPUs.

torch's sdpa reads 16-bit keys and values of a single query at a fraction of the speed of memory,
and matrix products are not much faster (`st3 bench --threads 1`: column "step / bound"). Both
products are sums of weighted rows, though: of values by the softmax's weights, of transposed keys
by the query. ``embedding_bag`` computes just that, in fp32, several times as fast. So the cache
stores keys *size first* (:mod:`st3.engine.layout`) where this path will read them. Trimmed and
untrimmed runs on st3's cache both use it, so that its gain is never sold as trimming.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from st3.methods.scores.base import products


def dense_decode(
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
        key, value: [B, KV heads, K, size], views of a buffer allowed.
        attention_mask: [B or 1, 1, 1, K] bool, or None.

    Returns:
        [B, 1, heads, size], None.
    """
    if not _are_rows(query, key, value):
        return matmul_decode(module, query, key, value, attention_mask, scaling)
    batch, heads, _, size = query.shape
    columns, capacity, first = key.shape[2], key.stride(3), key.storage_offset()
    # Each of the head size's places is a row, over all columns of the buffer.
    table = key.as_strided((batch * heads * size, capacity), (capacity, 1), 0)
    # The scale goes to the query, as softmax reads the sums as they are: they are 16-bit already.
    query = query * (size**-0.5 if scaling is None else scaling)
    found = _weighted_rows(table, _bags(batch * heads, size, size), query)
    logits = found.view(batch, heads, 1, capacity)[..., first : first + columns]
    weights = _softmax(logits, attention_mask)

    capacity, size = value.stride(1) // value.stride(2), value.shape[3]
    stored = (batch * heads - 1) * capacity + columns
    table = value.as_strided((stored, size), (size, 1), value.storage_offset())
    output = _weighted_rows(table, _bags(batch * heads, columns, capacity), weights)
    return output.view(batch, 1, heads, size), None


def matmul_decode(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same as two matrix products: for queries that share keys, and for compiled graphs."""
    batch, heads = query.shape[:2]
    logits = products(query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = _softmax(logits, attention_mask).to(query.dtype)
    output = torch.matmul(weights.view(batch, key.shape[1], -1, key.shape[2]), value)
    return output.view(batch, 1, heads, value.shape[-1]), None


def applies(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether :func:`dense_decode` can stand in for sdpa, and is the faster of the two."""
    return (
        query.shape[2] == 1
        and suits(query)
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and kwargs.get("position_bias") is None
        and kwargs.get("s_aux") is None
    )


def suits(states: Tensor) -> bool:
    """Whether entries such as these are ones that :func:`dense_decode` is made for."""
    # fp32: sdpa is as fast, in fewer calls.
    return states.device.type == "cpu" and states.dtype in (torch.bfloat16, torch.float16)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Weights [B, heads, 1, K], in the dtype of ``logits``; torch computes them in fp32."""
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1)


def _are_rows(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether all keys and values of the batch are rows of two tables, one query to each head."""
    _, heads, columns, size = key.shape
    if query.shape[1] != heads or query.dtype != key.dtype or torch.is_grad_enabled():
        return False
    capacity, first = key.stride(3), key.storage_offset()
    return (
        key.stride() == (heads * size * capacity, size * capacity, 1, capacity)
        and first + columns <= capacity
        and value.stride()[2:] == (value.shape[3], 1)
        and value.stride(0) == heads * value.stride(1)
    )


@lru_cache(maxsize=4)  # layers that keep as many tokens, one behind the other, share them
def _bags(bags: int, width: int, stride: int) -> tuple[Tensor, Tensor]:
    """The first ``width`` of the ``stride`` rows that a table has for each bag, one bag behind the
    other, and where each bag begins and the last one ends."""
    rows = _numbers(1 << (bags * stride - 1).bit_length())[: bags * stride]
    offsets = torch.arange(0, bags * width + 1, width, dtype=rows.dtype)
    return rows.view(bags, stride)[:, :width].reshape(-1), offsets


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
