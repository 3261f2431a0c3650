"""Which columns of a prompt batch are still there: ragged rows, kept tokens, their order.

A *column* is a place along the sequence dimension of the current layer. Before the first pruning
layer the columns are the prompt's own, with the caller's padding; from then on rows are
LEFT-aligned, so that plain causal attention needs no mask (behind a row's end stands garbage that
no valid token attends to). In the KV cache rows are right-aligned, so that the next token has one
place for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The facts of a prompt batch, read off the device once per prefill.

    Attributes:
        length: columns of this chunk of the prompt, padding included.
        images: for each row the number of visual tokens of each image (or video).
        n_text: for each row its other valid tokens.
        tail: trailing columns that are candidates of assisted decoding, not prompt.
    """

    length: int
    images: tuple[tuple[int, ...], ...]
    n_text: tuple[int, ...]
    tail: int = 0

    @property
    def batch(self) -> int:
        return len(self.images)

    @cached_property
    def n_visual(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.images)


@dataclass(frozen=True)
class Block:
    """The columns present in a run of decoder layers, [B, N].

    Attributes:
        index: original column of each column; None is the identity.
        visual: which columns are visual tokens.
        ordinal: a visual token's place among its row's visual tokens.
        group: which budget a visual token draws on: 0, or its image's number.
        valid: which columns hold a token of the row; None when all do.
        last: column of the prompt's last token, [B].
        counts: valid columns of each row.
        kept: for each row the visual tokens left in each group.
    """

    index: Tensor | None
    visual: Tensor
    ordinal: Tensor
    group: Tensor | None
    valid: Tensor | None
    last: Tensor
    counts: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]

    @cached_property  # of a block that several layers share
    def n_kept(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.kept)

    def to(self, device: torch.device) -> Block:
        """The same block on the device of the layer that needs it."""
        if self.visual.device == device:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def source_columns(self) -> Tensor:
        """Original column of each column, [B, N]."""
        return self._identity if self.index is None else self.index

    @cached_property
    def _identity(self) -> Tensor:
        return torch.arange(self.visual.shape[1], device=self.visual.device).expand_as(self.visual)


def first_block(
    visual: Tensor,
    attention_mask: Tensor | None,
    tail: int,
    per_image: bool,
    sizes: Sequence[int] | None = None,
) -> tuple[Rows, Block]:
    """Read a prompt batch: ``visual`` [B, T] bool, ``attention_mask`` [B, T] or None.

    An image is a run of visual tokens, cut where ``sizes``, the encoder's tokens of each image in
    order, say that images touch; families that put marker tokens between the tiles or rows of an
    image make several runs of it. A prompt's very last token is never counted as visual: its
    row is the one that ranks the others, so it must stay. This is the only place of a prefill where
    the host waits for the device.
    """
    batch, columns = visual.shape
    position = torch.arange(columns, device=visual.device)
    valid = attention_mask.bool() if attention_mask is not None else None
    last_valid = (position * valid).amax(1) if valid is not None else position[-1].expand(batch)
    visual = visual & (position != (last_valid - tail)[:, None])
    if valid is not None:
        visual = visual & valid
    number = torch.cumsum(_run_starts(visual), dim=1) - 1
    n_images = int(number.max().item()) + 1 if columns else 0
    facts = [] if n_images <= 0 else [((number == i) & visual).sum(1) for i in range(n_images)]
    n_valid = (
        valid.sum(1) if valid is not None else visual.new_full((batch,), columns, dtype=torch.long)
    )
    table = torch.stack([n_valid, *facts], dim=1).tolist()
    runs = [[n for n in row[1:] if n] for row in table]
    images = _cut_runs(runs, sizes) if sizes else tuple(map(tuple, runs))
    counts = tuple(row[0] for row in table)
    rows = Rows(
        columns, images, tuple(c - sum(i) for c, i in zip(counts, images, strict=True)), tail
    )
    all_valid = all(count == columns for count in counts)
    ordinal = torch.cumsum(visual, dim=1) - 1
    block = Block(
        index=None,
        visual=visual,
        ordinal=ordinal,
        group=_image_numbers(ordinal, images) if per_image else None,
        valid=None if all_valid else valid,
        last=last_valid - tail,
        counts=counts,
        kept=images if per_image else tuple((sum(row),) for row in images),
    )
    return rows, block


def _cut_runs(runs: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The runs of all rows, cut into images of ``sizes``; as they are where the two do not fit."""
    total = sum(map(sum, runs))
    copies = total // max(sum(sizes), 1)
    if copies > 1 and total == copies * sum(sizes) and len(runs) % copies == 0:
        # Beams and return sequences: generate() encodes an image once and repeats its row.
        once = _cut_runs(runs[::copies], sizes)
        return tuple(row for row in once for _ in range(copies))
    left = list(reversed(sizes))
    images = []
    for row in runs:
        cut: list[int] = []
        for run in row:
            while run:
                if not left or left[-1] > run:
                    return tuple(map(tuple, runs))
                cut.append(left.pop())
                run -= cut[-1]
        images.append(tuple(cut))
    return tuple(map(tuple, runs)) if left else tuple(images)


def _image_numbers(ordinal: Tensor, images: Sequence[Sequence[int]]) -> Tensor | None:
    """The image of each visual column, [B, N]; None if no row has more than one."""
    most = max(map(len, images), default=0)
    if most < 2:
        return None
    ends = torch.cumsum(_table(images, most, ordinal.device), dim=1)[:, :-1]
    return (ordinal[:, :, None] >= ends[:, None, :]).sum(dim=2)


def _run_starts(visual: Tensor) -> Tensor:
    starts = visual.clone()
    starts[:, 1:] &= ~visual[:, :-1]
    return starts


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
    ends = torch.cumsum(_table(block.kept, groups + 1, score.device), dim=1)
    first = torch.nn.functional.pad(ends, (1, 0))
    return rank - first.gather(1, group)


def select(block: Block, score: Tensor, kept: Sequence[Sequence[int]]) -> tuple[Block, Tensor]:
    """Keep the best ``kept[row][group]`` visual tokens and every text token, in their order.

    Returns:
        the new block, and the columns of the old one that it is made of, [B, N'].
    """
    dropped = [sum(old) - sum(new) for old, new in zip(block.kept, kept, strict=True)]
    if block.group is None and block.valid is None and len(set(dropped)) == 1:
        return _select_equally(block, score, kept)
    groups = max(len(row) for row in kept)
    limit = _table(kept, max(groups, 1), score.device)
    allowed = limit[:, :1] if block.group is None else limit.gather(1, block.group)
    keep = ~block.visual | (rank_visual(block, score) < allowed)
    if block.valid is not None:
        keep = keep & block.valid
    counts = tuple(c - d for c, d in zip(block.counts, dropped, strict=True))
    width = max(counts)
    columns = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :width]
    ragged = any(count != width for count in counts)
    valid = keep.gather(1, columns) if ragged else None
    visual = block.visual.gather(1, columns)
    # Text is never dropped, so the prompt's last token stands as far from its row's end as before.
    before_last = torch.cumsum(keep, dim=1).gather(1, block.last[:, None])[:, 0] - 1
    return replace(
        block,
        index=block.source_columns().gather(1, columns),
        visual=visual & valid if valid is not None else visual,
        ordinal=block.ordinal.gather(1, columns),
        group=None if block.group is None else block.group.gather(1, columns),
        valid=valid,
        last=before_last,
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


_TEXT = 1e300  # above every score; scores are taken in double precision


def cache_order(
    block: Block, score: Tensor | None, stays: Sequence[Sequence[int]]
) -> Tensor | None:
    """The columns in the order of the KV cache, [B, M], right-aligned: padding, then visual tokens
    by rising importance, then text. Without a score visual tokens stay where they are. None means
    that the columns already stand so. ``stays[row][group]`` tokens are never annealed."""
    if score is None and block.valid is None:
        return None
    columns = block.visual.shape[1]
    place = torch.arange(columns, device=block.visual.device)
    if score is not None and block.group is None:
        # One sort, from the end of the cache to its start: text from the last on, visual tokens
        # from the best on (the earlier of equals first), padding.
        key = torch.where(block.visual, score.double(), _TEXT * (1 + place.double() / columns))
        if block.valid is not None:
            key = key.masked_fill(~block.valid, float("-inf"))
        back = torch.argsort(key, dim=1, descending=True, stable=True)
        return back[:, : max(block.counts)].flip(1)
    key = (place + columns + 1).expand_as(block.visual)
    if score is not None:
        key = torch.where(block.visual, columns - _drop_rank(block, score, stays), key)
    if block.valid is not None:
        key = key.masked_fill(~block.valid, 0)
    return torch.argsort(key, dim=1, stable=True)[:, columns - max(block.counts) :]


def _drop_rank(block: Block, score: Tensor, stays: Sequence[Sequence[int]]) -> Tensor:
    """Rank over a whole row with a budget per image: the highest is annealed first. All images lose
    the same share at the same time: that is what their own curves, rounded half up, do."""
    if block.group is None:
        raise ValueError("rows with one budget need no ranks: sort by the score")
    rank = rank_visual(block, score)
    width = max(len(row) for row in block.kept)
    size = _table(block.kept, width, rank.device).clamp_min(1).gather(1, block.group)
    share = (rank + 0.5) / size
    share = share.masked_fill(rank < _table(stays, width, rank.device).gather(1, block.group), 0.0)
    order = torch.argsort(share.masked_fill(~block.visual, 2.0), dim=1, stable=True)
    place = torch.arange(rank.shape[1], device=rank.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def _table(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """Ragged host counts as a tensor [B, width], filled up with 0."""
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)


def gather_columns(tensor: Tensor, columns: Tensor) -> Tensor:
    """``tensor`` [B, N, D] at ``columns`` [B, M] -> [B, M, D], as one copy of whole rows."""
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


Memo = dict[int, tuple[object, object]]


def memoised(memo: Memo, original: object, make: Callable[[], object]) -> object:
    """``make()`` once per ``original`` object: a text model passes the same mask and tables to all
    layers of a kind. The memo holds the original, so that its id stays its own."""
    found = memo.get(id(original))
    if found is None:
        found = memo[id(original)] = (original, make())
    return found[1]
