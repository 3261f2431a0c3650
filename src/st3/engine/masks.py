"""Attention masks for trimmed layers, in the form that each attention kernel wants.

A mask is None whenever it can be: a boolean mask keeps sdpa off its fast causal kernels. sdpa
takes bool [B, 1, Q, K], eager an additive float of that shape, flash attention a bool [B, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from st3.methods.upload import upload

Kind = Literal["sdpa", "eager", "flash"]
Starts = tuple[tuple[int, ...], ...]


def kind_of(attention: str) -> Kind:
    """The mask form of an attention implementation's name."""
    if "flash" in attention:
        return "flash"
    return "eager" if attention == "eager" else "sdpa"


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """[Q, K] bool, the last query aligned with the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def finish(mask: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """A bool mask [B, 1, Q, K] in the form of ``kind``."""
    if kind == "sdpa":
        return mask
    if kind == "flash":
        return mask[:, 0, -1]
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def as_bool(mask: Tensor) -> Tensor:
    """Any 4D mask as bool."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def is_plain(mask: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether a 4D prefill mask is nothing but causal and padding, so that left-aligned rows need
    none. Rows of padding queries are not compared: nobody reads them."""
    seen = as_bool(mask)
    expected = causal(seen.shape[-2], seen.shape[-1], seen.device).expand_as(seen)
    if attention_mask is None:
        return bool(torch.equal(seen, expected))
    valid = attention_mask.bool()
    expected = expected & valid[:, None, None, :]
    return bool(((seen == expected) | ~valid[:, None, :, None]).all())


def gather_mask(mask: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """A 4D mask [B or 1, 1, T, T] at rows and columns ``index`` [B, N]."""
    batch, columns = index.shape
    mask = mask.expand(batch, *mask.shape[1:])
    rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    mask = mask.gather(2, rows)
    mask = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], columns, -1))
    if valid is None:
        return mask
    if mask.dtype == torch.bool:
        return mask & valid[:, None, None, :]
    return mask.masked_fill(~valid[:, None, None, :], torch.finfo(mask.dtype).min)


def prefill_mask(
    columns: int, kind: Kind, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The mask of left-aligned rows of plain causal attention."""
    if kind != "eager":  # eager knows no causality of its own
        return None
    return finish(causal(columns, columns, device)[None, None], kind, dtype)


def visible_keys(
    starts: Sequence[int], first: int, end: int, queries: int, device: torch.device
) -> Tensor:
    """[B, 1, Q, end - first] bool: of stored columns from ``first`` on those from each row's start
    on, for all queries alike."""
    place = torch.arange(first, end, device=device)
    seen = place >= upload(starts, device)[:, None]
    return seen[:, None, None, :].expand(-1, 1, queries, -1)


def own_keys(mask: Tensor | None, index: Tensor, valid: Tensor | None, length: int) -> Tensor:
    """[B, 1, N, N] bool: what the columns ``index`` [B, N] of a chunk of ``length`` tokens see of
    each other, by the chunk's own mask; plainly causal where there is none of four dimensions."""
    if mask is None or mask.dim() == 2:
        columns = index.shape[1]
        return causal(columns, columns, index.device).expand(index.shape[0], 1, -1, -1)
    return as_bool(gather_mask(mask[..., -length:].to(index.device), index, valid))


def decode_mask(
    starts: Sequence[Sequence[int]],
    first: int,
    end: int,
    kind: Kind,
    dtype: torch.dtype,
    device: torch.device,
    known: dict[Starts, Tensor],
) -> Tensor | None:
    """The mask of tokens appended to a trimmed cache.

    Args:
        starts: for each query the first absolute column that each row may see, [Q][B].
        first: absolute column of key 0.
        end: absolute column behind the last key; the queries are the last Q keys.
        known: device copies of starts relative to ``first``, filled here: rows of a batch keep
            their distances for many layers and steps, and a copy makes the host wait.
    """
    queries, keys = len(starts), end - first
    if queries == 1 and all(start <= first for start in starts[0]):
        return None
    relative = tuple(tuple(start - first for start in row) for row in starts)
    if relative not in known:
        if len(known) >= 256:
            known.clear()
        known[relative] = upload(relative, device).T  # [B, Q]
    mask = torch.arange(keys, device=device) >= known[relative].to(device)[:, :, None]
    if queries > 1:
        mask = mask & causal(queries, keys, device)
    return finish(mask[:, None], kind, dtype)
