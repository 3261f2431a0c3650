"""Rank visual tokens, choose which are kept, and put those in the order of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from st3.engine.prompt import Block, table
from st3.methods.upload import upload


def rank_visual(block: Block, score: Tensor) -> Tensor:
    """Rank of each visual column within its budget, 0 the best, [B, N]. On equal scores the
    earlier token ranks higher. Other columns hold no meaning."""
    score = score.masked_fill(~block.visual, float("-inf"))
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    if block.group is None:
        return torch.empty_like(order).scatter_(1, order, place)
    groups = max(len(row) for row in block.kept)
    group = block.group.masked_fill(~block.visual, groups)  # all others behind the last image
    by_group = torch.argsort(group.gather(1, order), dim=1, stable=True)
    order = order.gather(1, by_group)
    rank = torch.empty_like(order).scatter_(1, order, place)
    ends = torch.cumsum(table(block.kept, groups + 1, score.device), dim=1)
    first = torch.nn.functional.pad(ends, (1, 0))
    return rank - first.gather(1, group)


def counts_above(block: Block, score: Tensor, least: float) -> tuple[tuple[int, ...], ...]:
    """How many visual tokens of each row and budget have a score above ``least``. The host waits
    for the device."""
    stays = block.visual & (score > least)
    groups = max(len(row) for row in block.kept)
    group = torch.zeros_like(block.ordinal) if block.group is None else block.group
    counts = torch.zeros(len(stays), max(groups, 1), dtype=torch.long, device=score.device)
    counts.scatter_add_(1, group, stays.long())
    rows = zip(counts.tolist(), block.kept, strict=True)
    return tuple(tuple(row[: len(kept)]) for row, kept in rows)


def select(
    block: Block, score: Tensor, kept: Sequence[Sequence[int]], right: bool = False
) -> tuple[Block, Tensor]:
    """Keep the best ``kept[row][group]`` visual tokens and every text token, in their order.

    Args:
        right: whether ragged rows shall end in the same column, and not begin in it.

    Returns:
        the new block, and the columns of the old one that it is made of, [B, N'].
    """
    dropped = [sum(old) - sum(new) for old, new in zip(block.kept, kept, strict=True)]
    if block.group is None and block.valid is None and len(set(dropped)) == 1:
        return _select_equally(block, score, kept)
    groups = max(len(row) for row in kept)
    limit = table(kept, max(groups, 1), score.device)
    allowed = limit[:, :1] if block.group is None else limit.gather(1, block.group)
    keep = ~block.visual | (rank_visual(block, score) < allowed)
    if block.valid is not None:
        keep = keep & block.valid
    counts = tuple(c - d for c, d in zip(block.counts, dropped, strict=True))
    width = max(counts)
    if right:
        columns = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, -width:]
    else:
        columns = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :width]
    ragged = any(count != width for count in counts)
    valid = keep.gather(1, columns) if ragged else None
    visual = block.visual.gather(1, columns)
    # Text is never dropped, so the prompt's last token stands as far from its row's end as before.
    last = torch.cumsum(keep, dim=1).gather(1, block.last[:, None])[:, 0] - 1
    if right:
        last = last + width - upload(counts, last.device)
    return replace(
        block,
        index=block.source_columns().gather(1, columns),
        visual=visual & valid if valid is not None else visual,
        ordinal=block.ordinal.gather(1, columns),
        group=None if block.group is None else block.group.gather(1, columns),
        valid=valid,
        last=last,
        counts=counts,
        kept=tuple(tuple(row) for row in kept),
    ), columns


def _select_equally(
    block: Block, score: Tensor, kept: Sequence[Sequence[int]]
) -> tuple[Block, Tensor]:
    """The same for rows without padding that lose as many each: a third of the small kernels."""
    columns = block.visual.shape[1]
    width = columns - (block.n_kept[0] - sum(kept[0]))
    first = score.nan_to_num().masked_fill(~block.visual, float("inf"))  # text before all others
    order = first.sort(dim=1, descending=True, stable=True).indices
    chosen = order[:, :width].sort(dim=1).values
    return Block(
        index=chosen if block.index is None else block.index.gather(1, chosen),
        visual=block.visual.gather(1, chosen),
        ordinal=block.ordinal.gather(1, chosen),
        group=None,
        valid=None,
        last=block.last - (columns - width),
        counts=(width,) * len(kept),
        kept=tuple(map(tuple, kept)),
    ), chosen


def cache_order(
    block: Block, score: Tensor | None, floors: Sequence[Sequence[int]]
) -> Tensor | None:
    """The columns in the order of the KV cache, [B, M], right-aligned: padding, then visual tokens
    by rising importance, then text. Without a score visual tokens are left in their places. None
    means that the columns already stand so. ``floors[row][group]`` tokens are never annealed. Of a
    score [B, KV heads, N] an order of each head, [B, KV heads, M]."""
    if score is not None and score.dim() == 3:
        heads = score.shape[1]
        repeated = [row for row in floors for _ in range(heads)]
        order = cache_order(block.apart(heads), score.flatten(0, 1), repeated)
        return None if order is None else order.unflatten(0, (-1, heads))
    if score is None and block.valid is None:
        return None
    columns = block.visual.shape[1]
    place = torch.arange(columns, device=block.visual.device)
    behind = _HIGHEST + place  # text, in its order, behind all visual tokens
    if score is None:
        key = behind.expand_as(block.visual)
    elif block.group is None:
        # Of equal scores the later token is annealed first, as it is dropped first.
        key = torch.where(block.visual, _as_integers(score) * columns - place, behind)
    else:
        key = torch.where(block.visual, -_drop_rank(block, block.group, score, floors), behind)
    if block.valid is not None:
        key = key.masked_fill(~block.valid, -_HIGHEST)
    return torch.argsort(key, dim=1, stable=True)[:, columns - max(block.counts) :]


_HIGHEST = 1 << 61  # above every score as an integer times every number of columns


def _as_integers(score: Tensor) -> Tensor:
    """int64 in the order of the float32 ``score``: so that one sort can hold a second key, without
    double precision, which some devices lack."""
    bits = score.float().view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _drop_rank(
    block: Block, group: Tensor, score: Tensor, floors: Sequence[Sequence[int]]
) -> Tensor:
    """Rank over a whole row with a budget per image: the highest is annealed first. All images lose
    the same share at the same time: that is what their own curves, rounded half up, do."""
    rank = rank_visual(block, score)
    width = max(len(row) for row in block.kept)
    size = table(block.kept, width, rank.device).clamp_min(1).gather(1, group)
    share = (rank + 0.5) / size
    share = share.masked_fill(rank < table(floors, width, rank.device).gather(1, group), 0.0)
    order = torch.argsort(share.masked_fill(~block.visual, 2.0), dim=1, stable=True)
    place = torch.arange(rank.shape[1], device=rank.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def gather_columns(tensor: Tensor, columns: Tensor) -> Tensor:
    """``tensor`` [B, N, D] at ``columns`` [B, M] -> [B, M, D], as one copy of whole rows; or of
    several streams of hidden states, [S, B, N, D]."""
    if tensor.dim() == 4:
        return torch.stack([gather_columns(stream, columns) for stream in tensor])
    batch, length, size = tensor.shape
    if batch == 1:
        return tensor.index_select(1, columns[0])
    offset = torch.arange(batch, device=columns.device)[:, None] * length
    flat = tensor.reshape(batch * length, size).index_select(0, (columns + offset).flatten())
    return flat.view(batch, columns.shape[1], size)


def gather_positions(tensor: Tensor, columns: Tensor) -> Tensor:
    """Rotary tables [..., 1 or B, T, D] at ``columns`` [B, M] -> [..., B, M, D]."""
    if tensor.shape[-3] == 1 and columns.shape[0] == 1:
        return tensor.index_select(-2, columns[0])
    lead = tensor.shape[:-3]
    index = columns.view((1,) * len(lead) + (*columns.shape, 1))
    index = index.expand(*lead, *columns.shape, tensor.shape[-1])
    return tensor.expand(*lead, columns.shape[0], *tensor.shape[-2:]).gather(-2, index)


def gather_tables(tables: Any, index: Tensor) -> Any:
    """Position tables, one or several, at the columns ``index`` [B, M]."""
    if isinstance(tables, Tensor):
        return gather_positions(tables, index.to(tables.device))
    return type(tables)(gather_tables(table, index) for table in tables)


def gather_tokens(value: Tensor, index: Tensor, length: int) -> Tensor:
    """An input with one entry per token of the prompt, [B, length, ...], at ``index`` [B, M]; any
    other tensor as it is."""
    if value.dim() < 2 or value.shape[0] != index.shape[0] or value.shape[1] != length:
        return value
    index = index.to(value.device)
    flat = gather_columns(value.reshape(*value.shape[:2], -1), index)
    return flat.view(*index.shape, *value.shape[2:])


def scatter_columns(hidden: Tensor, block: Block, length: int) -> Tensor:
    """The columns of a block [B, N, D] back at their places of ``length``, zeros elsewhere."""
    if block.index is None:
        return hidden
    batch, _, size = hidden.shape
    if block.valid is not None:
        hidden = hidden.masked_fill(~block.valid[..., None], 0)
    offset = torch.arange(batch, device=hidden.device)[:, None] * length
    full = hidden.new_zeros(batch * length, size)
    full.index_copy_(0, (block.index + offset).flatten(), hidden.reshape(-1, size))
    return full.view(batch, length, size)


def block_features(block: Block, visual: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Of features [tokens, D] of the visual tokens [B, T] of a whole prompt those that a block
    still has: its visual columns [B, N] and their features."""
    index = block.source_columns()
    visual, features = visual.to(index.device), features.to(index.device)
    number = (torch.cumsum(visual.flatten(), 0) - 1).view_as(visual)
    here = visual.gather(1, index)
    if block.valid is not None:
        here = here & block.valid
    return here, features[number.gather(1, index)[here]]
