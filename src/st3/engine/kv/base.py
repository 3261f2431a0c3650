"""What all stores of KV entries have in common: appending, windows, new rankings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from st3.engine.kv.buffer import KVBuffer, Room
from st3.engine.kv.layout import capacity_for
from st3.engine.kv.timeline import Timeline
from st3.engine.kv.visible import RowEntries
from st3.errors import TrimStateError
from st3.methods.upload import upload


class Store(ABC):
    """The KV entries of one decoder layer.

    Args:
        layer: decoder layer, 0-based.
        timeline: shared by the layers of a cache.
        window: sliding window of the layer in tokens, or None.
        recalls: whether a new ranking covers what annealing has hidden, so that none of it is
            evicted.

    Attributes:
        rows: what is stored of each row.
        length: logical length, as if nothing had been trimmed.
        entry_bytes: bytes of one KV entry.
    """

    def __init__(
        self, layer: int, timeline: Timeline, window: int | None = None, recalls: bool = False
    ) -> None:
        self.layer = layer
        self.timeline = timeline
        self.window = window
        self.recalls = recalls
        self.reset()

    def reset(self) -> None:
        """Forget everything. Changes state."""
        self.rows: tuple[RowEntries, ...] = ()
        self.length = 0
        self.entry_bytes = 0
        self.buffer: KVBuffer | None = None
        self._room: Room | None = None
        self._starts: dict[int, tuple[int, ...]] = {}
        self._evicted_before = 0  # the first later token that still sees all it must see

    # What is visible --------------------------------------------------------------------------

    @abstractmethod
    def _row_starts(self, step: int) -> tuple[int, ...]:
        """See :meth:`row_starts`."""

    @abstractmethod
    def _next(self, length: int) -> list[int] | None:
        """The original column of each row's next token, at logical length ``length``; None where
        nothing may leave the window."""

    def row_starts(self, step: int) -> tuple[int, ...]:
        """First column of each row that decode step ``step`` sees."""
        starts = self._starts.get(step)
        if starts is None:
            if len(self._starts) > 64:  # enough for the steps of one pass
                self._starts.clear()
            starts = self._starts[step] = self._row_starts(step)
        return starts

    @property
    def step(self) -> int:
        """Decode step of the last token stored."""
        return self.timeline.step(self.length - 1)

    @property
    def end(self) -> int:
        """The column behind the last one in use."""
        return self.filled.end

    @property
    def filled(self) -> KVBuffer:
        """The buffer.

        Raises:
            TrimStateError: if nothing was written yet.
        """
        if self.buffer is None:
            raise TrimStateError(f"layer {self.layer} of the cache is empty: no prompt was stored")
        return self.buffer

    def first_visible(self) -> int:
        """First column that some row of the last step sees."""
        return max(self.filled.base, min(self.row_starts(self.step)))

    def positions(self, first: int) -> Tensor:
        """Original columns of the entries from ``first`` on, [B, columns].

        Raises:
            TrimStateError: for a layer without a sliding window.
        """
        found = self.filled.position_view(first)
        if found is None:
            raise TrimStateError(f"layer {self.layer} has no sliding window and keeps no positions")
        return found

    # Appending --------------------------------------------------------------------------------

    def make_room(self, new: int) -> Room:
        """Ready the buffer for ``new`` columns: let it grow. Done for all layers in a row at the
        begin of a pass, which is much faster than between two layers. Changes state."""
        buffer, step = self.filled, self.timeline.step(self.timeline.start)
        buffer.make_writable()
        if buffer.width + new > buffer.capacity:
            keep = self._needed_from(step)  # what stands before it is evicted on the way
            buffer.move(keep, capacity_for(buffer.end + new - keep, buffer.size_first))
        self._room = buffer.room(min(self.row_starts(step)), new)
        return self._room

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a pass's new entries [B, KV heads, new, head size].

        Returns:
            the keys and values that attention reads: the visible ones and the new.
        """
        new = keys.shape[2]
        to_keys, to_values, live_keys, live_values = self._room or self.make_room(new)
        self._room = None
        to_keys.copy_(keys)
        to_values.copy_(values)
        self.filled.end += new
        self.length = self.timeline.start + self.timeline.tokens
        # Kernels for several queries want the head size last.
        dense = self.filled.size_first and new > 1
        return (live_keys.contiguous() if dense else live_keys), live_values

    def note_positions(self, positions: Tensor) -> None:
        """Original columns of the tokens just appended, [B, new]; sliding layers only."""
        if self.buffer is not None and self.buffer.positions is not None:
            width, new = self.buffer.width, positions.shape[1]
            self.buffer.positions[:, width - new : width] = positions

    def _needed_from(self, step: int) -> int:
        """First column that step ``step`` or a later one can ask for."""
        return min(row.pad for row in self.rows) if self.recalls else min(self.row_starts(step))

    # Sliding windows --------------------------------------------------------------------------

    def evict_if_full(self) -> None:
        """Where the buffer is full, evict text that no later token sees. Changes state."""
        self._room = None  # a pass that was broken off may have left some that fits no other
        buffer = self.buffer
        if buffer is None or buffer.positions is None or buffer.width < buffer.capacity:
            return
        width, base, start = buffer.width, buffer.base, self.timeline.start
        stored = buffer.positions[:, :width]
        left, first = self._evict(
            stored, self._next(start), self.timeline.step(start), base, buffer.end
        )
        if left is not None:
            keys, values = buffer.keys[:, :, :width], buffer.values[:, :, :width]
            self.buffer = KVBuffer.of(
                keys, values, left, stored.gather(1, left), first, buffer.end, buffer.size_first
            )

    def _evict(
        self, positions: Tensor, ahead: list[int] | None, step: int, base: int, end: int
    ) -> tuple[Tensor | None, int]:
        """Evict the oldest entries of those that stand in their order, up to the windows of the
        tokens at original columns ``ahead`` and of all behind them. Rows then begin later.

        Args:
            positions: original columns of the columns from ``base`` to ``end``, [B, columns].
            step: the first decode step that shall still find all that it sees.

        Returns:
            the columns that are left, by their places so far, [B, columns], None if all are; and
            the column that is the first of them.
        """
        if self.window is None or ahead is None or max(ahead) < self.window:
            return None, base
        device = positions.device
        place = torch.arange(base, end, device=device)
        limit = upload(ahead, device)[:, None] - self.window
        gone = ((place >= self._ordered_from(device)) & (positions <= limit)).sum(1)
        counts = gone.tolist()
        self._evicted_before = max(self._evicted_before, min(ahead))
        if not any(counts):
            return None, base
        self.rows = tuple(row.moved(n) for row, n in zip(self.rows, counts, strict=True))
        self._starts = {}
        first = max(base, self._needed_from(step))
        place = place[first - base :]
        moved = torch.where(place >= self._ordered_from(device), place, place - gone[:, None])
        return moved.clamp_min(base) - base, first

    def _ordered_from(self, device: torch.device) -> Tensor:
        """Column from which on each row stands in its original order, [B, 1]."""
        places = [row.pad + row.ordered for row in self.rows]
        return upload(places, device)[:, None]

    # New rankings -----------------------------------------------------------------------------

    def ranked(self) -> tuple[int, tuple[int, ...]]:
        """What a new ranking covers: the first column, and each row's first visual entry."""
        if self.recalls:
            pads = tuple(row.pad for row in self.rows)
            return max(self.filled.base, min(pads)), pads
        return self.first_visible(), self.row_starts(self.step)

    def rerank(self, scores: Tensor) -> None:
        """Sort the visible visual entries of each row anew; all stored ones if the store recalls.
        Changes state.

        Args:
            scores: [B, columns] for the columns that :meth:`ranked` tells, from 0 to 1, the higher
                the better.
        """
        if self.buffer is None:
            return
        first, starts = self.ranked()
        ends = [row.text - first for row in self.rows]
        span = max(ends)
        if span <= 1:
            return
        place = torch.arange(self.end - first, device=scores.device)
        lo, hi = (_column([start - first for start in starts], scores), _column(ends, scores))
        ranked = (place >= lo) & (place < hi)
        # Text keeps its place behind, what precedes a row's start its place before.
        key = torch.where(ranked, scores.float(), torch.where(place >= hi, 2.0, -1.0))
        self.buffer.gather(first, torch.argsort(key, dim=1, stable=True)[:, :span])

    # Bytes and checks -------------------------------------------------------------------------

    @property
    def visible_tokens(self) -> int:
        """KV entries that the last step saw, summed over the rows."""
        starts = self.row_starts(self.step)
        return self.end * len(starts) - sum(starts)

    @property
    def allocated_tokens(self) -> int:
        """Columns held in memory, times rows."""
        buffer = self.buffer  # read once: a server asks while another thread changes its batch
        return 0 if buffer is None else buffer.rows * buffer.capacity

    def footprint(self) -> tuple[int, int]:
        """Live and allocated bytes."""
        return self.entry_bytes * self.visible_tokens, self.entry_bytes * self.allocated_tokens

    def check_integrity(self) -> None:
        """Look whether counts and memory fit together; for tests and idle servers.

        Raises:
            TrimStateError: with what does not fit.
        """
        buffer = self.buffer
        if buffer is None:
            return
        problems = {
            "a row begins behind its end": any(row.text > buffer.end for row in self.rows),
            "more columns are in use than allocated": buffer.width > buffer.capacity,
            "rows and memory differ": len(self.rows) != buffer.rows,
            "keys and values differ": buffer.keys.shape[:3] != buffer.values.shape[:3],
            "visible entries are not in memory": min(self.row_starts(self.step)) < buffer.base,
        }
        for problem, there in problems.items():
            if there:
                raise TrimStateError(f"layer {self.layer} of the cache is damaged: {problem}")


def _column(values: Sequence[int], like: Tensor) -> Tensor:
    return upload(values, like.device)[:, None]
