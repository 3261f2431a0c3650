"""How the buffers of a KV cache lie in memory, and how columns get into them.

Values lie as [B, KV heads, columns, head size]. So do keys, unless a layer is *size first*: then
they lie as [B, KV heads, head size, columns], for :func:`st3.engine.decode.decode_attention`.
Either way a buffer is a tensor of the former shape; only its strides differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from st3.engine.select import gather_columns
from st3.errors import UnsupportedModelError


def is_lean(*tensors: Tensor) -> bool:
    """Whether keeping them keeps nothing else alive (projections can be parts of a whole)."""
    return all(
        4 * t.untyped_storage().nbytes() <= 5 * t.numel() * t.element_size() for t in tensors
    )


def is_size_first(buffer: Tensor) -> bool:
    """Whether a buffer of keys, or a view of one, lies as [B, KV heads, head size, columns]."""
    return buffer.stride(-1) != 1


def entry_bytes(key: Tensor, value: Tensor) -> int:
    """Bytes of one KV entry."""
    size = key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3]
    return size * key.element_size()


def capacity_for(width: int, size_first: bool = False) -> int:
    """Columns of a buffer for ``width`` of them. Growing copies what is live, so spare columns make
    copies rare, but keep what annealing released for longer. A share of the width bounds what
    copies take of a step, however long the prompt is."""
    capacity = width + 16 + width // 32
    # Lines of the cache, and few different row lengths: embedding_bag makes code for each.
    return (capacity + 8) // 16 * 16 if size_first else capacity


def allocate(
    like: Tensor, columns: int, rows: int | None = None, size_first: bool = False
) -> Tensor:
    """An empty buffer for entries such as ``like``; ``rows``: None for as many rows."""
    batch, heads, _, size = like.shape
    batch = batch if rows is None else rows
    if size_first:
        return like.new_empty(batch, heads, size, columns).transpose(2, 3)
    return like.new_empty(batch, heads, columns, size)


def select_rows(buffer: Tensor, indices: Tensor) -> Tensor:
    """The rows ``indices`` of a buffer, which lie as it does."""
    indices = indices.to(buffer.device)
    if is_size_first(buffer):
        return buffer.transpose(2, 3).index_select(0, indices).transpose(2, 3)
    return buffer.index_select(0, indices)


def in_order(positions: Tensor, order: Tensor) -> Tensor:
    """``positions`` [B, N] in an order [B, M], or in those of each head, [B, KV heads, M]."""
    order = order.to(positions.device)
    if order.dim() == 3:
        positions = positions[:, None].expand(-1, order.shape[1], -1)
    return positions.gather(-1, order)


def copy_columns(source: Tensor, order: Tensor | None, target: Tensor) -> None:
    """``target[b, :, i] = source[b, :, order[b, i]]``; all columns in their order if None. Where
    ``order`` is that of each head, ``target[b, h, i] = source[b, h, order[b, h, i]]``."""
    size_first = is_size_first(target)
    if order is None and not size_first:
        target.copy_(source)
        return
    if not source.numel():  # of latent attention without RoPE
        return
    # Projections lie in memory as [B, N, heads * head size]: gathering there moves whole rows, 7 to
    # 20 times faster on a CPU than `gather` along the sequence of [B, heads, N, head size].
    batch, heads, columns, size = source.shape
    rows = source.transpose(1, 2).reshape(batch, columns, heads * size)
    if order is not None and order.dim() == 3:
        if order.shape[1] != heads:
            raise UnsupportedModelError(
                "this model caches a form of its keys that heads share: leave per_head out"
            )
        place = torch.arange(batch, device=order.device)[:, None, None] * columns
        head = torch.arange(heads, device=order.device)[:, None]
        index = ((place + order) * heads + head).transpose(1, 2)  # [B, M, heads]
        rows = rows.view(-1, size).index_select(0, index.flatten()).view(batch, -1, heads * size)
    elif order is not None:
        rows = gather_columns(rows, order)
    if not size_first:
        target.copy_(rows.view(batch, -1, heads, size).transpose(1, 2))
        return
    # torch has a blocked kernel that transposes one matrix, and none for many.
    for row, place in zip(rows, target.transpose(2, 3), strict=True):
        place.copy_(row.t().contiguous().view_as(place))
