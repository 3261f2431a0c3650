"""One decode batch of sequences that started at different times, under different policies.

Each row keeps a clock of its own: how long its prompt was, how many steps it has decoded, how many
visual tokens its policy shows at that step. What the rows share is a buffer per layer in which all
of them end in the same column, so that the next token has one place for all. ``st3 serve`` builds
its running batches from these layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.engine.kv.base import Store
from st3.engine.kv.buffer import KVBuffer
from st3.engine.kv.layout import allocate, capacity_for, entry_bytes, is_size_first
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Timeline
from st3.engine.kv.visible import FOREVER, RowEntries, visible
from st3.errors import TrimStateError
from st3.methods.schedule import Schedule


class VisibleCounts:
    """The visual KV entries that each layer shows of one row, by decode step."""

    def __init__(self, schedule: Schedule, budgets: tuple[int, ...]) -> None:
        self.schedule = schedule
        self.budgets = budgets
        self._steps = [self._compute(0)]
        self._last = self._compute(FOREVER)
        self._peaks: dict[int, tuple[int, ...]] = {}

    def _compute(self, step: int) -> tuple[int, ...]:
        layers = range(self.schedule.num_layers)
        return tuple(visible(self.schedule, layer, self.budgets, step) for layer in layers)

    def at(self, step: int) -> tuple[int, ...]:
        """For each decoder layer the entries that decode step ``step`` sees (0: the prefill)."""
        steps = self._steps
        while len(steps) <= step:
            if steps[-1] == self._last:
                return self._last
            steps.append(self._compute(len(steps)))
        return steps[step]

    def peaks(self, max_steps: int) -> tuple[int, ...]:
        """The most entries of each layer, visual and generated, at a step up to ``max_steps``."""
        if max_steps not in self._peaks:
            best = list(self.at(0))
            for step in range(1, max_steps + 1):
                now = self.at(step)
                best = [max(b, n + step) for b, n in zip(best, now, strict=True)]
                if now == self._last:  # from here on only the answer grows
                    best = [max(b, n + max_steps) for b, n in zip(best, now, strict=True)]
                    break
            if len(self._peaks) >= 64:
                self._peaks.clear()
            self._peaks[max_steps] = tuple(best)
        return self._peaks[max_steps]


@functools.lru_cache(maxsize=256)
def visible_counts(schedule: Schedule, budgets: tuple[int, ...]) -> VisibleCounts:
    """Shared by all rows of one policy with as many visual tokens."""
    return VisibleCounts(schedule, budgets)


@dataclass
class JoinedSequence:
    """A sequence of a joined batch.

    Attributes:
        counts: what its layers show of its visual tokens.
        prompt: logical length of its prompt.
        position: the next token's position, one number per dimension of a multimodal RoPE.
        rerank: decode steps after which its visual tokens are ranked anew, or None.
        steps: decode steps stored.
    """

    counts: VisibleCounts
    prompt: int
    position: tuple[int, ...]
    rerank: int | None = None
    steps: int = 0

    @property
    def length(self) -> int:
        """Logical length: prompt and generated tokens stored, as if nothing had been trimmed."""
        return self.prompt + self.steps


@dataclass(frozen=True)
class SequenceEntries:
    """What one sequence holds in one layer: its visual tokens, by rising importance if they are to
    be annealed, then its text.

    Attributes:
        keys, values: [1, KV heads, columns, head size].
        visual: how many of the columns are visual tokens.
        ordered: how many of the first columns are visual tokens by rising importance; 0 where all
            stand as in the prompt.
        positions: original columns [1, columns]; layers with a sliding window only.
    """

    keys: Tensor
    values: Tensor
    visual: int
    ordered: int
    positions: Tensor | None = None

    @property
    def columns(self) -> int:
        return int(self.keys.shape[2])


class JoinedStore(Store):
    """The KV entries of one decoder layer, of all sequences of a joined batch.

    Args:
        layer: decoder layer, 0-based.
        sequences: the batch's sequences, shared by its layers.
        timeline: shared by its layers; its time is the longest sequence's logical length.
        window: sliding window of the layer in tokens, or None.
    """

    def __init__(
        self,
        layer: int,
        sequences: Sequence[JoinedSequence],
        timeline: Timeline,
        window: int | None = None,
    ) -> None:
        self.sequences = sequences
        self._shift: tuple[int, ...] = ()
        super().__init__(layer, timeline, window)

    def fill(self, entries: Sequence[SequenceEntries]) -> None:
        """Hold these sequences, in place of whatever was here. Changes state."""
        width = max(one.columns for one in entries)
        first, batch = entries[0], len(entries)
        size_first = is_size_first(first.keys)
        capacity = capacity_for(width, size_first)
        self.entry_bytes = entry_bytes(first.keys, first.values)
        positions = None
        if self.window is not None:
            device = first.keys.device
            positions = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.buffer = KVBuffer(
            allocate(first.keys, capacity, batch, size_first),
            allocate(first.values, capacity, batch),
            positions,
            base=0,
            end=width,
            size_first=size_first,
        )
        self.rows = (RowEntries(0, 0, 0, ()),) * batch
        for row, one in enumerate(entries):
            self.place(row, one)
        self.synchronise()

    def place(self, row: int, entries: SequenceEntries) -> None:
        """Write a sequence over the one that was in its row; it must not be wider than the batch.
        Changes state."""
        buffer = self.filled
        start, stop = buffer.width - entries.columns, buffer.width
        for target, source in ((buffer.keys, entries.keys), (buffer.values, entries.values)):
            target[row, :, :start] = 0  # hidden by the mask, but a NaN there would not be
            target[row, :, start:stop] = source[0]
        if buffer.positions is not None:
            if entries.positions is None:
                raise TrimStateError(f"layer {self.layer} has a sliding window: pass positions")
            buffer.positions[row, start:stop] = entries.positions[0]
        rows = list(self.rows)
        rows[row] = RowEntries(buffer.base + start, entries.visual, entries.ordered, ())
        self.rows = tuple(rows)

    def synchronise(self) -> None:
        """Set the batch's time by its sequences, after some were exchanged. Changes state."""
        self.length = max(sequence.length for sequence in self.sequences)
        self._shift = tuple(self.length - sequence.steps for sequence in self.sequences)
        self._starts = {}

    def entries(self, row: int) -> SequenceEntries:
        """What a row's next step could still see, as views of the buffer."""
        buffer, held = self.filled, self.rows[row]
        start = self.row_starts(self.step)[row]
        live = slice(start - buffer.base, buffer.width)
        here = slice(row, row + 1)
        return SequenceEntries(
            buffer.keys[here, :, live],
            buffer.values[here, :, live],
            held.text - start,
            max(0, held.pad + held.ordered - start),
            None if buffer.positions is None else buffer.positions[here, live],
        )

    @property
    def width(self) -> int:
        """Columns from the first allocated one to the last token's."""
        return self.filled.width

    @property
    def capacity(self) -> int:
        """Columns allocated for each row."""
        buffer = self.buffer
        return 0 if buffer is None else buffer.capacity

    @property
    def allocated_bytes(self) -> int:
        return self.allocated_tokens * self.entry_bytes

    def _row_starts(self, step: int) -> tuple[int, ...]:
        """Each row's own step is the batch's, shifted."""
        rows = zip(self.rows, self.sequences, self._shift, strict=True)
        return tuple(
            row.text - sequence.counts.at(step - shift)[self.layer] for row, sequence, shift in rows
        )

    def _next(self, length: int) -> list[int] | None:
        if any(sequence.rerank for sequence in self.sequences):
            return None
        return [sequence.length for sequence in self.sequences]


def entries_of(store: KVStore) -> SequenceEntries:
    """What the only row of a trimmed layer holds, written to the cache's order if it was not.

    Raises:
        TrimStateError: for more rows than one.
    """
    store.write()
    buffer, first = store.filled, store.first_visible()
    if buffer.rows != 1:
        raise TrimStateError("a prefilled prompt of exactly one row is needed")
    (row,) = store.rows
    positions = None if store.window is None else store.positions(first)
    keys, values = buffer.view(buffer.keys, first), buffer.view(buffer.values, first)
    return SequenceEntries(keys, values, row.visual, row.ordered, positions)


def plain_entries(keys: Tensor, values: Tensor, length: int, window: int | None) -> SequenceEntries:
    """What an untrimmed cache layer of one row and logical length ``length`` holds; one with a
    sliding window holds the last columns."""
    columns = keys.shape[2]
    positions = torch.arange(length - columns, length, device=keys.device)[None]
    return SequenceEntries(keys, values, 0, 0, None if window is None else positions)
