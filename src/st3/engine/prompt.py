"""Read a prompt batch: its rows, its images, and which columns a decoder layer still sees.

A *column* is a place along the sequence dimension of the current layer. Before the first pruning
layer the columns are the prompt's own, with the caller's padding; from then on rows are
LEFT-aligned, so that plain causal attention needs no mask (behind a row's end stands garbage that
no valid token attends to). In the KV cache rows are right-aligned, so that the next token has one
place for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from st3.methods.upload import upload


@dataclass(frozen=True)
class Rows:
    """The facts of a prompt batch, read off the device once per prefill.

    Attributes:
        length: columns of this chunk of the prompt, padding included.
        images: for each row the number of visual tokens of each image (or video).
        n_text: for each row its other valid tokens.
        tail: trailing columns that are candidates of assisted decoding, not prompt.
        whole: as ``images``, with a prompt's very last token where that is visual: what the encoder
            gave.
        grids: the shape of each image's tokens, (rows, columns) or (frames, rows, columns), None
            for an image that is no grid; empty if nobody asked.
    """

    length: int
    images: tuple[tuple[int, ...], ...]
    n_text: tuple[int, ...]
    tail: int = 0
    grids: tuple[tuple[tuple[int, ...] | None, ...], ...] = ()
    whole: tuple[tuple[int, ...], ...] = ()

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

    def apart(self, heads: int) -> Block:
        """A block in which each of ``heads`` KV heads is a row."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        repeated: dict[str, Any] = {
            name: value.repeat_interleave(heads, 0)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        for name in ("counts", "kept"):
            repeated[name] = tuple(row for row in values[name] for _ in range(heads))
        return replace(self, **repeated)

    def source_columns(self) -> Tensor:
        """Original column of each column, [B, N]."""
        return self._identity if self.index is None else self.index

    @cached_property
    def _identity(self) -> Tensor:
        return torch.arange(self.visual.shape[1], device=self.visual.device).expand_as(self.visual)


def read_prompt(
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
    if valid is not None:
        visual = visual & valid
    last = position == (last_valid - tail)[:, None]
    ends = (visual & last).any(1)
    number = torch.cumsum(_run_starts(visual), dim=1) - 1
    n_images = int(number.max().item()) + 1 if columns else 0
    facts = [] if n_images <= 0 else [((number == i) & visual).sum(1) for i in range(n_images)]
    n_valid = (
        valid.sum(1) if valid is not None else visual.new_full((batch,), columns, dtype=torch.long)
    )
    visual = visual & ~last
    table = torch.stack([n_valid, ends, *facts], dim=1).tolist()
    runs = [[n for n in row[2:] if n] for row in table]
    whole = _cut_runs(runs, sizes) if sizes else tuple(map(tuple, runs))
    images = tuple(
        tuple(n for n in (*row[:-1], row[-1] - 1) if n) if ends_in_image else row
        for row, (_, ends_in_image, *_) in zip(whole, table, strict=True)
    )
    counts = tuple(row[0] for row in table)
    rows = Rows(
        columns,
        images,
        tuple(c - sum(i) for c, i in zip(counts, images, strict=True)),
        tail,
        whole=whole,
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
    ends = torch.cumsum(table(images, most, ordinal.device), dim=1)[:, :-1]
    return (ordinal[:, :, None] >= ends[:, None, :]).sum(dim=2)


def _run_starts(visual: Tensor) -> Tensor:
    starts = visual.clone()
    starts[:, 1:] &= ~visual[:, :-1]
    return starts


def table(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """Ragged host counts as a tensor [B, width], filled up with 0."""
    return upload([list(row) + [0] * (width - len(row)) for row in rows], device)
