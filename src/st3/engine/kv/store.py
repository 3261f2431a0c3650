"""The KV entries of one decoder layer of trimmed prompts.

A layer's buffer is ``[padding | visual tokens by rising importance | text ...]``. RoPE is applied
before keys are stored, so their order is free, and annealing is nothing but a start pointer that
moves to the right.

A prompt is *admitted* at the end of its prefill and *written* into that order, and into the buffer,
at the begin of the next pass: until then its keys and values stay where the model made them, so
that the first token waits for neither sorting nor copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.engine.kv.base import Store
from st3.engine.kv.buffer import KVBuffer
from st3.engine.kv.layout import entry_bytes, in_order, is_lean
from st3.engine.kv.timeline import Phase, Timeline
from st3.engine.kv.visible import FOREVER, RowEntries, row_starts
from st3.engine.prompt import Block
from st3.engine.ranker import DeferredScore
from st3.engine.select import cache_order
from st3.errors import TrimStateError
from st3.methods.schedule import Schedule


@dataclass
class Pending:
    """A prompt that is not written yet.

    Attributes:
        key, value: as the model made them, [B, KV heads, N, head size].
        block: its columns; None for a text prompt that was stored before it was trimmed.
        score: [B, N] or [B, KV heads, N], what the visual tokens are ordered by, if they are.
        positions: original columns [B, N].
        size_first: how the buffer shall hold its keys.
        width: columns that the buffer will have in use.
    """

    key: Tensor
    value: Tensor
    block: Block | None = None
    score: Tensor | DeferredScore | None = None
    positions: Tensor | None = None
    size_first: bool = False
    width: int = 0


class KVStore(Store):
    """The entries of the prompts that a cache holds, and of the text behind them.

    Args:
        schedule: the counts.
        keeps_text: whether text that has left the window is kept: a new ranking asks for attention
            over all of a row's text.
    """

    def __init__(
        self,
        layer: int,
        schedule: Schedule,
        timeline: Timeline,
        window: int | None = None,
        recalls: bool = False,
        keeps_text: bool = False,
    ) -> None:
        self.schedule = schedule
        self.keeps_text = keeps_text
        super().__init__(layer, timeline, window, recalls)

    def reset(self) -> None:
        super().reset()
        self.pending: Pending | None = None
        self.next_column: Tensor | None = None  # set while a compiled step runs

    def _row_starts(self, step: int) -> tuple[int, ...]:
        return row_starts(self.rows, self.schedule, self.layer, step)

    def _next(self, length: int) -> list[int] | None:
        return None if self.keeps_text else [length] * len(self.rows)

    # Prompts ----------------------------------------------------------------------------------

    def receive(self, key: Tensor, value: Tensor) -> None:
        """Take the keys and values of a prompt under way. Changes state: :meth:`admit` follows at
        the end of the pass. (What is cached need not be what attention reads: multi-head latent
        attention caches a compressed form.)"""
        self.pending = Pending(key, value)

    @property
    def received(self) -> Pending:
        """The prompt under way.

        Raises:
            TrimStateError: if its layer gave none.
        """
        if self.pending is None:
            raise TrimStateError(f"layer {self.layer} stored nothing: its cache was not updated")
        return self.pending

    def admit(
        self,
        block: Block,
        score: Tensor | DeferredScore | None,
        budgets: Sequence[Sequence[int]],
        size_first: bool = False,
    ) -> Tensor | None:
        """Take over the prompt received. Changes state: its entries are there, in no order yet.

        Args:
            block: its columns.
            score: what its visual tokens are ordered by; None where none will be annealed.
            budgets: the rows' original visual tokens: one number, or one per image.

        Returns:
            as :meth:`write`, if the prompt had to be written at once.
        """
        prompt = self.received
        prompt.block, prompt.score, prompt.size_first = block, score, size_first
        prompt.width = max(block.counts)
        counts = zip(block.counts, block.n_kept, budgets, strict=True)
        return self._take(
            prompt,
            [
                RowEntries(prompt.width - n, kept, 0 if score is None else kept, tuple(budget))
                for n, kept, budget in counts
            ],
        )

    def adopt(self, key: Tensor, value: Tensor, pads: Sequence[int], length: int) -> None:
        """Take over a plain cache layer that holds an earlier turn of text alone. Changes state.

        Args:
            key, value: what it holds, [B, KV heads, columns, head size]: the last columns, if it
                has a sliding window.
            pads: columns of padding of each row.
            length: logical length of the turn.
        """
        batch, columns = key.shape[0], key.shape[2]
        left = length - columns
        place = torch.arange(left, length, device=key.device)
        prompt = Pending(key, value, positions=place.expand(batch, columns), width=columns)
        self.pending = prompt
        self._take(prompt, [RowEntries(max(0, pad - left), 0, 0, ()) for pad in pads])

    def _take(self, prompt: Pending, rows: Sequence[RowEntries]) -> Tensor | None:
        self.rows, self._starts = tuple(rows), {}
        self.length = self.timeline.start + self.timeline.tokens
        self.entry_bytes = entry_bytes(prompt.key, prompt.value)
        prompt.key, prompt.value = prompt.key.detach(), prompt.value.detach()
        return None if is_lean(prompt.key, prompt.value) else self.write()

    @torch.no_grad()
    def write(self) -> Tensor | None:
        """Write an admitted prompt into the buffer, in the order of the cache. Changes state.

        Returns:
            original columns in that order, as events tell it; None if no prompt waited.
        """
        prompt = self.pending
        if prompt is None or not self.rows:
            return None
        self.pending = None
        order, positions = self._order(prompt), prompt.positions
        if positions is None and prompt.block is not None:
            positions = prompt.block.source_columns()
        if positions is None:
            raise TrimStateError(f"layer {self.layer} was given no columns with its prompt")
        if order is not None:
            positions = in_order(positions, order)
        base = 0
        if self.window is not None:
            # A turn behind it may be under way already, whose first token sees furthest back.
            line = self.timeline
            ahead = self._next(line.start if line.phase is Phase.APPEND else line.dense_from)
            left, base = self._evict(positions, ahead, 0, 0, prompt.width)
            if left is not None:
                order = left if order is None else order.gather(1, left.to(order.device))
                positions = positions.gather(1, left)
        self.buffer = KVBuffer.of(
            prompt.key,
            prompt.value,
            order,
            positions if self.window is not None else None,
            base,
            prompt.width,
            prompt.size_first,
        )
        return positions

    def _order(self, prompt: Pending) -> Tensor | None:
        if prompt.block is None:
            return None
        score = prompt.score
        if isinstance(score, DeferredScore):
            score = score.compute(prompt.key)
        floors = [
            [self.schedule.visible(self.layer, n, FOREVER) for n in row.budgets]
            for row in self.rows
        ]
        return cache_order(prompt.block, score, floors)

    @property
    def visible_tokens(self) -> int:
        if self.buffer is None:
            return sum(self.pending.width - row.pad for row in self.rows) if self.pending else 0
        return super().visible_tokens

    @property
    def allocated_tokens(self) -> int:
        if self.pending is not None and self.rows:
            return int(self.pending.key.shape[0] * self.pending.key.shape[2])
        return super().allocated_tokens

    # What a cache is asked for ----------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Remove the tokens behind logical length ``length``. Changes state.

        Raises:
            TrimStateError: if that reaches into a trimmed prompt, or before what a compaction kept.
        """
        remove = self.length - length
        self.write()
        if remove <= 0 or self.buffer is None:
            return
        if length < self.timeline.dense_from:
            raise TrimStateError(
                f"cannot crop {remove} tokens: the cache would end inside a trimmed prompt "
                f"({self.timeline.dense_from} tokens). Start again from the whole prompt"
            )
        if length < self._evicted_before:
            raise TrimStateError(
                f"cannot crop {remove} tokens: text that those before them see has left the "
                "sliding window and is freed. Start again from the whole prompt"
            )
        self.length = length
        self.buffer.end -= remove
        self.timeline.tokens = length - self.timeline.start
        if min(self.row_starts(self.step)) < self.buffer.base:
            raise TrimStateError(
                "cannot crop past a compaction: the visual entries of that step are freed. Do not "
                "call compact() between steps that are rolled back"
            )

    def select_rows(self, indices: Tensor) -> None:
        """Keep the rows ``indices``. Changes state."""
        self.write()
        if self.buffer is None:
            return
        self.buffer.make_writable()
        self.buffer.select_rows(indices)
        alike = len(set(self.rows)) == 1
        places = [0] * len(indices) if alike else indices.tolist()  # no wait for the device if so
        self.rows, self._starts = tuple(self.rows[place] for place in places), {}

    def compact(self) -> None:
        """Free what annealing has released; a later crop cannot bring it back. Changes state."""
        self.write()
        if self.buffer is not None:
            first = self.ranked()[0]
            if first > self.buffer.base or self.buffer.capacity > self.buffer.width:
                self.buffer.move(first, self.end - first)

    # Compiled decoding (engine/compiled.py) ---------------------------------------------------

    def make_fixed_room(self, first: int, bucket: int) -> None:
        """Make sure that one more column fits; if not, move what is visible from ``first`` on into
        a buffer whose capacity is a multiple of ``bucket``, its free columns zero. Changes
        state."""
        buffer = self.filled
        buffer.make_writable()
        if buffer.bucket == bucket and buffer.width < buffer.capacity:
            return
        live = buffer.end - first
        buffer.move(first, -(-(live + bucket // 2) // bucket) * bucket)
        for tensor in (buffer.keys, buffer.values):
            tensor[:, :, live:] = 0
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs then read it in place
        buffer.bucket = bucket

    def append_fixed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one column where a compiled step says, and return whole buffers. Changes state."""
        buffer, column = self.filled, self.next_column
        if column is None:
            raise TrimStateError("no compiled step is under way")
        buffer.keys.index_copy_(2, column, keys)
        buffer.values.index_copy_(2, column, values)
        return buffer.keys, buffer.values

    def place_position(self, position: Tensor) -> None:
        """Note the original column of the token that a compiled step appends."""
        positions = self.filled.positions
        if positions is not None and self.next_column is not None:
            positions.index_copy_(1, self.next_column, position.expand(positions.shape[0], 1))
