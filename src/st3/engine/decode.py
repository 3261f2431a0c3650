"""Attention of a single query over the dense KV buffer, for CPUs.

torch's sdpa reads bf16 keys of a single query at about a fifth of the speed of a matrix product
(CPU, torch 2.13). A matrix product reaches memory speed only with the long operand first: ``K q``,
not ``q K^T``, whose kernel packs K anew at every call. Trimmed and untrimmed runs on st3's cache
both use this path, so that its gain is never sold as trimming.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
    batch, heads, _, size = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    scale = size**-0.5 if scaling is None else scaling
    logits = torch.matmul(key, query.view(batch, kv_heads, group, size).transpose(-1, -2))
    logits = logits.transpose(-1, -2).float() * scale  # [B, KV heads, group, K]
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, float("-inf"))
    weights = logits.softmax(dim=-1).to(value.dtype)
    output = torch.matmul(weights, value)
    return output.view(batch, 1, heads, value.shape[-1]), None


def applies(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether :func:`dense_decode` can stand in for sdpa, and is the faster of the two."""
    return (
        query.device.type == "cpu"
        and query.dtype is not torch.float32  # sdpa is as fast, in fewer calls
        and query.shape[2] == 1
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and kwargs.get("position_bias") is None
        and kwargs.get("s_aux") is None
    )
