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
from typing import Any

import torch
from torch import Tensor

from st3.engine.cache import TrimmedLayer
from st3.engine.clock import Clock
from st3.engine.layout import allocate, capacity_for, entry_bytes, is_size_first
from st3.errors import TrimStateError
from st3.methods.schedule import Schedule


class VisibleCounts:
    """The visual KV entries that each layer shows of one row, by decode step."""

    def __init__(self, schedule: Schedule, budgets: tuple[int, ...]) -> None:
        self.schedule = schedule
        self.budgets = budgets
        self._steps = [self._compute(0)]
        self._last = self._compute(1 << 40)  # what is shown for ever
        self._peaks: dict[int, tuple[int, ...]] = {}

    def _compute(self, step: int) -> tuple[int, ...]:
        layers = range(self.schedule.num_layers)
        return tuple(sum(self.schedule.visible(la, n, step) for n in self.budgets) for la in layers)

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
class Row:
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
class Part:
    """What one row holds in one layer: its visual tokens, by rising importance if they are to be
    annealed, then its text.

    Attributes:
        keys, values: [1, KV heads, columns, head size].
        visual: how many of the columns are visual tokens.
        leading: how many of the first columns are visual tokens by rising importance; 0 where all
            stand as in the prompt.
        positions: original columns [1, columns]; layers with a sliding window only.
    """

    keys: Tensor
    values: Tensor
    visual: int
    leading: int
    positions: Tensor | None = None

    @property
    def columns(self) -> int:
        return int(self.keys.shape[2])


class JoinedLayer(TrimmedLayer):
    """The KV entries of one decoder layer, of all rows of a joined batch.

    Args:
        layer: decoder layer, 0-based.
        rows: the batch's rows, shared by its layers.
        clock: shared by its layers; its time is the longest row's logical length.
        window: sliding window of the layer in tokens, or None.
    """

    def __init__(
        self, layer: int, rows: Sequence[Row], clock: Clock, window: int | None = None
    ) -> None:
        self.rows = rows
        self._shift: tuple[int, ...] = ()
        super().__init__(layer, rows[0].counts.schedule, clock, window)

    def fill(self, parts: Sequence[Part]) -> None:
        """Take these rows, in place of whatever was here."""
        width = max(part.columns for part in parts)
        first = parts[0]
        batch = len(parts)
        self.size_first = is_size_first(first.keys)
        capacity = capacity_for(width, self.size_first)
        self.bytes_per_token = entry_bytes(first.keys, first.values)
        self._keys = allocate(first.keys, capacity, batch, self.size_first)
        self._values = allocate(first.values, capacity, batch)
        if self.window is not None:
            self._positions = torch.zeros(
                batch, capacity, dtype=torch.long, device=first.keys.device
            )
        self.base, self.end = 0, width
        self.pad = self.kept = self.leading = (0,) * batch
        self.is_initialized = True
        for row, part in enumerate(parts):
            self.place(row, part)
        self.synchronise()

    def place(self, row: int, part: Part) -> None:
        """Write a row over the one that was in its place; it must not be wider than the batch."""
        if self._keys is None or self._values is None:
            raise TrimStateError(f"layer {self.layer} is empty: fill() comes first")
        start, stop = self.end - self.base - part.columns, self.end - self.base
        for buffer, source in ((self._keys, part.keys), (self._values, part.values)):
            buffer[row, :, :start] = 0  # hidden by the mask, but a NaN there would not be
            buffer[row, :, start:stop] = source[0]
        if self._positions is not None:
            if part.positions is None:
                raise TrimStateError(f"layer {self.layer} has a sliding window: pass positions")
            self._positions[row, start:stop] = part.positions[0]
        self.pad = _replaced(self.pad, row, self.base + start)
        self.kept = _replaced(self.kept, row, part.visual)
        self.leading = _replaced(self.leading, row, part.leading)

    def synchronise(self) -> None:
        """Set the batch's time by its rows, after some were exchanged."""
        self.length = max(row.length for row in self.rows)
        self._shift = tuple(self.length - row.steps for row in self.rows)
        self._starts = {}

    def part(self, row: int) -> Part:
        """What a row's next step could still see, as views of the buffer."""
        if self._keys is None or self._values is None:
            raise TrimStateError(f"layer {self.layer} of the batch is empty")
        start = self.row_starts(self.step)[row]
        live = slice(start - self.base, self.end - self.base)
        here = slice(row, row + 1)
        return Part(
            self._keys[here, :, live],
            self._values[here, :, live],
            self.pad[row] + self.kept[row] - start,
            max(0, self.pad[row] + self.leading[row] - start),
            None if self._positions is None else self._positions[here, live],
        )

    @property
    def width(self) -> int:
        """Columns from the first allocated one to the last token's."""
        return self.end - self.base

    @property
    def capacity(self) -> int:
        """Columns allocated for each row."""
        return 0 if self._keys is None else int(self._keys.shape[2])

    @property
    def allocated_bytes(self) -> int:
        return self.allocated_tokens * self.bytes_per_token

    def row_starts(self, step: int) -> tuple[int, ...]:
        """First absolute column that each row sees; each row's own step is the batch's, shifted."""
        starts = self._starts.get(step)
        if starts is None:
            rows = zip(self.pad, self.kept, self.rows, self._shift, strict=True)
            starts = tuple(
                pad + kept - row.counts.at(step - shift)[self.layer]
                for pad, kept, row, shift in rows
            )
            if len(self._starts) > 8:
                self._starts.clear()
            self._starts[step] = starts
        return starts

    def _next(self, length: int) -> list[int] | None:
        if any(row.rerank for row in self.rows):
            return None
        return [row.length for row in self.rows]

    def crop(self, tokens_to_remove: int) -> None:
        raise TrimStateError("a joined batch cannot be cropped: its rows decode one token a step")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise TrimStateError("rows of a joined batch are exchanged with fill() and place()")


def part_of(layer: Any, prompt: int, window: int | None) -> Part:
    """What the only row of a cache layer holds: of a trimmed layer what is live, of a plain one
    everything. ``prompt`` is the row's logical length."""
    if isinstance(layer, TrimmedLayer):
        keys, values = layer.keys, layer.values
        first = layer.first_live()
        if keys is None or values is None or keys.shape[0] != 1:
            raise TrimStateError("a prefilled prompt of exactly one row is needed")
        positions = None if window is None else layer.positions(first)
        return Part(keys, values, layer.kept[0], layer.leading[0], positions)
    keys, values = layer.keys, layer.values
    columns = keys.shape[2]  # a plain layer with a sliding window keeps the last ones
    positions = torch.arange(prompt - columns, prompt, device=keys.device)[None]
    return Part(keys, values, 0, 0, None if window is None else positions)


def _replaced(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])
