"""Cache layers that hold trimmed prompts, swapped one by one into generate()'s own DynamicCache.

A layer's buffer is ``[padding | visual tokens by rising importance | text ...]``, preallocated.
RoPE is applied before keys are stored, so their order is free, and annealing is nothing but a start
pointer that moves to the right. Columns are counted from the layer's first stored one (*absolute*
columns); ``base`` is the first that is still allocated.

A prompt is brought into that order, and into the buffer, when the first further token comes: until
then its keys and values stay where the model made them, so that the first token waits for neither.

Text that a sliding window has left behind is given up, when a prompt is filed and when a buffer is
full; what stands before it moves up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from st3.engine.clock import Clock, Phase
from st3.engine.layout import (
    Unfiled,
    allocate,
    capacity_for,
    copy_columns,
    entry_bytes,
    is_lean,
    is_size_first,
    select_rows,
)
from st3.errors import TrimStateError
from st3.methods.schedule import Schedule


def _buffer(name: str) -> Any:
    """A buffer of a layer; a prompt is filed into it when it is first asked for."""

    def get(layer: TrimmedLayer) -> Tensor | None:
        if layer._unfiled is not None:
            layer._file(layer._unfiled)
        return layer._buffers.get(name)

    def put(layer: TrimmedLayer, value: Tensor) -> None:
        layer._buffers[name] = value
        if name == "keys":
            layer._is_static = False

    return property(get, put)


class TrimmedLayer(CacheLayerMixin):
    """The KV entries of one decoder layer, [B, KV heads, columns, head size].

    Args:
        layer: decoder layer, 0-based.
        schedule: the counts.
        clock: shared by the layers of a cache.
        window: sliding window of the layer in tokens, or None.
        recalls: whether a new ranking covers what annealing has hidden, so that none of it is given
            up.
        forgets: whether to give up what has left the window. A new ranking asks for attention over
            all of a row's text.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # lengths are logical in every layer: masks are never cut to a window
    supports_early_init = False

    def __init__(
        self,
        layer: int,
        schedule: Schedule,
        clock: Clock,
        window: int | None = None,
        recalls: bool = False,
        forgets: bool = True,
    ) -> None:
        # No super().__init__(): it assigns `keys` and `values`, which are views here.
        self.layer = layer
        self.schedule = schedule
        self.clock = clock
        self.window = window
        self.recalls = recalls
        self.forgets = forgets
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.length = 0
        self.bytes_per_token = 0  # of a KV entry
        self.base = self.end = 0
        self.pad: tuple[int, ...] = ()
        self.kept: tuple[int, ...] = ()
        self.leading: tuple[int, ...] = ()  # of them those that stand by importance
        self.images: tuple[tuple[int, ...], ...] = ()
        self._unfiled: Unfiled | None = None
        self._buffers: dict[str, Tensor] = {}
        self._pending: tuple[Tensor, Tensor] | None = None
        # Where a pass writes its keys and values, and what it then reads.
        self._room: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._seen_from = 0  # the first later token for which nothing is missing
        self.next_column: Tensor | None = None  # set while a compiled step runs
        self._is_static = False  # whether the buffers are as compiled steps want them
        self._starts: dict[int, tuple[int, ...]] = {}
        self.size_first = False  # how keys lie in memory: engine/layout.py

    _keys = _buffer("keys")
    _values = _buffer("values")
    _positions = _buffer("positions")  # sliding layers only

    # What is live -----------------------------------------------------------------------------

    def row_starts(self, step: int) -> tuple[int, ...]:
        """First absolute column of each row that decode step ``step`` sees: a pure function of the
        step, so that crops, beams and copies need no history."""
        starts = self._starts.get(step)
        if starts is None:
            seen: dict[tuple[int, ...], int] = {}
            for images in self.images:
                if images not in seen:
                    seen[images] = sum(self.schedule.visible(self.layer, n, step) for n in images)
            starts = tuple(
                pad + kept - seen[images]
                for pad, kept, images in zip(self.pad, self.kept, self.images, strict=True)
            )
            if len(self._starts) > 64:  # enough for the steps of one pass
                self._starts.clear()
            self._starts[step] = starts
        return starts

    @property
    def step(self) -> int:
        """Decode step of the last token stored."""
        return self.clock.step(self.length - 1)

    def footprint(self) -> tuple[int, int]:
        """Live and allocated bytes."""
        size = self.bytes_per_token
        return size * self.live_tokens, size * self.allocated_tokens

    @property
    def live_tokens(self) -> int:
        """KV entries that the last step saw, summed over the rows."""
        starts = self.row_starts(self.step)
        return self.end * len(starts) - sum(starts)

    @property
    def allocated_tokens(self) -> int:
        """Columns held in memory, times rows."""
        held = self._keys if self._unfiled is None else self._unfiled.key
        return 0 if held is None else held.shape[0] * held.shape[2]

    def _view(self, buffer: Tensor, first: int) -> Tensor:
        return buffer[:, :, first - self.base : self.end - self.base]

    @property
    def keys(self) -> Tensor | None:
        """The live columns, padding of shorter rows included."""
        return None if self._keys is None else self._view(self._keys, self.first_live())

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._view(self._values, self.first_live())

    def first_live(self) -> int:
        return max(self.base, min(self.row_starts(self.step)))

    def ranked(self) -> tuple[int, tuple[int, ...]]:
        """What a new ranking covers: the first column, and each row's first visual entry."""
        if self.recalls:
            return max(self.base, min(self.pad)), self.pad
        return self.first_live(), self.row_starts(self.step)

    def keys_from(self, first: int) -> Tensor:
        """The keys of the columns from ``first`` on, [B, KV heads, columns, head size]."""
        return self._view(self.buffer, first)

    def positions(self, first: int) -> Tensor:
        """Original columns of the entries from ``first`` on, [B, columns]; sliding layers only."""
        if self._positions is None:
            raise TrimStateError(f"layer {self.layer} has no sliding window and keeps no positions")
        return self._positions[:, first - self.base : self.end - self.base]

    # Writing ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers are made by :meth:`store`, when it is known what stays."""

    def store(
        self,
        order: Callable[[], Tensor | None],
        positions: Tensor,
        counts: Sequence[int],
        kept: Sequence[int],
        images: Sequence[Sequence[int]],
        width: int | None = None,
        ranked: bool = False,
    ) -> None:
        """Take over the prompt last given to :meth:`update`.

        Args:
            order: gives the columns in cache order [B, M], or None when they stand so; called when
                the prompt is filed.
            positions: original columns [B, N].
            counts: valid columns of each row.
            kept: visual columns of each row.
            images: the rows' original visual tokens, by budget: one number, or one per image.
            width: columns to keep; None: those of the longest row.
            ranked: whether the order is the cache's; if not, all columns stand as in the prompt.
        """
        (key, value), self._pending = self.given, None
        width = max(counts) if width is None else width
        self.base, self.end = 0, width
        self.pad = tuple(width - count for count in counts)
        self.kept = tuple(kept)
        self.leading = self.kept if ranked else (0,) * len(self.kept)
        self.images = tuple(map(tuple, images))
        self.is_initialized = True
        self._starts = {}
        self.length = self.clock.start + self.clock.tokens
        self.bytes_per_token = entry_bytes(key, value)
        self._unfiled = Unfiled(key.detach(), value.detach(), order, positions)
        if not is_lean(key, value):
            self._file(self._unfiled)

    @property
    def given(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the prompt under way, as :meth:`update` was given them."""
        if self._pending is None:
            raise TrimStateError(f"layer {self.layer} stored nothing: its cache was not updated")
        return self._pending

    def holds(self, key: Tensor) -> bool:
        """Whether ``key`` is what the prompt under way has given to :meth:`update`."""
        return self._pending is not None and self._pending[0] is key

    def _file(self, prompt: Unfiled) -> None:
        """Write a prompt into new buffers, in cache order."""
        self._unfiled = None
        with torch.no_grad():
            order, positions = prompt.order(), None
            if self.window is not None:
                positions = prompt.positions
                if order is not None:
                    positions = positions.gather(1, order.to(positions.device))
                # A turn behind it may be under way already, whose first token sees furthest back.
                appends = self.clock.phase is Phase.APPEND
                ahead = self._next(self.clock.start if appends else self.clock.dense_from)
                left = self._clear(positions, ahead, step=0)
                if left is not None:
                    order = left if order is None else order.gather(1, left.to(order.device))
                    positions = positions.gather(1, left)
            self._fill(prompt.key, prompt.value, positions, order)

    def _fill(
        self, key: Tensor, value: Tensor, positions: Tensor | None, order: Tensor | None
    ) -> None:
        """Make new buffers, with room for more, of the columns ``order`` [B, width] of ``key`` and
        ``value``, all if None; ``positions`` are in that order already."""
        width = self.end - self.base
        capacity = capacity_for(width, self.size_first)
        for name, source in (("_keys", key), ("_values", value)):
            size_first = self.size_first and name == "_keys"
            buffer = allocate(source, capacity, size_first=size_first)
            copy_columns(source, order, buffer[:, :, :width])
            setattr(self, name, buffer)
        if positions is not None:
            self._positions = positions.new_zeros(len(positions), capacity)
            self._positions[:, :width] = positions

    # Sliding windows ----------------------------------------------------------------------------

    def _next(self, length: int) -> list[int] | None:
        """The original column of each row's next token, at logical length ``length``; None where
        everything stays."""
        return [length] * len(self.pad) if self.forgets else None

    def _clear(self, positions: Tensor, ahead: list[int] | None, step: int) -> Tensor | None:
        """Give up the oldest entries of those that stand in their order, up to the windows of the
        tokens at original columns ``ahead`` and of all behind them. Rows then begin later, and the
        layer at the first column that step ``step`` or a later one needs.

        Args:
            positions: original columns of the columns from ``base`` on, [B, columns].

        Returns:
            the columns that are left, by their places so far, [B, columns]; None if all are.
        """
        if self.window is None or ahead is None or max(ahead) < self.window:
            return None
        device, base = positions.device, self.base
        place = torch.arange(base, self.end, device=device)
        limit = torch.tensor(ahead, device=device)[:, None] - self.window
        gone = ((place >= self._ordered_from(device)) & (positions <= limit)).sum(1)
        counts = gone.tolist()
        self._seen_from = max(self._seen_from, min(ahead))
        if not any(counts):
            return None
        self.pad = tuple(pad + count for pad, count in zip(self.pad, counts, strict=True))
        self._starts = {}
        self.base = max(base, self._needed_from(step))
        place = place[self.base - base :]
        moved = torch.where(place >= self._ordered_from(device), place, place - gone[:, None])
        return moved.clamp_min(base) - base

    def _ordered_from(self, device: torch.device) -> Tensor:
        """Absolute column from which on each row stands in its original order, [B, 1]."""
        places = [pad + count for pad, count in zip(self.pad, self.leading, strict=True)]
        return torch.tensor(places, device=device)[:, None]

    # Appending ----------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the pass's new keys and values and return those that attention reads.

        During a prefill nothing is stored yet: :meth:`store` follows once the layer's own attention
        has ranked the visual tokens. (What is cached need not be what attention reads: multi-head
        latent attention caches a compressed form.)
        """
        if self.next_column is not None and self._keys is not None and self._values is not None:
            self._keys.index_copy_(2, self.next_column, key_states)
            self._values.index_copy_(2, self.next_column, value_states)
            return self._keys, self._values
        clock = self.clock
        if clock.phase is Phase.IDLE:
            raise TrimStateError(
                "this cache was trimmed by st3 and can only be continued by the model while it is "
                "trimmed: call generate() inside the `with st3.trim(...)` block"
            )
        if clock.phase is Phase.PREFILL:
            self._pending = (key_states, value_states)
            return key_states, value_states
        new = key_states.shape[2]
        if self._room is None:
            self.make_room(new)
        room, self._room = self._room, None
        if room is None:
            raise TrimStateError(f"layer {self.layer} of the cache is empty: no prompt was stored")
        to_keys, to_values, keys, values = room
        to_keys.copy_(key_states)
        to_values.copy_(value_states)
        self.end += new
        self.length = clock.start + clock.tokens
        # Kernels for several queries want the head size last.
        return (keys.contiguous() if self.size_first and new > 1 else keys), values

    def settle(self) -> None:
        """At the begin of a pass behind a prompt, before its masks are made: file a prompt that
        waits and, where a buffer is full, give up what no later token sees."""
        self._room = None  # a pass that was broken off may have left some that fits no other
        if self._unfiled is not None:
            self._file(self._unfiled)
        columns = self.end - self.base
        if self._positions is None or columns < self.buffer.shape[2]:
            return
        stored, start = self._positions[:, :columns], self.clock.start
        keys, values = (self._buffers[name][:, :, :columns] for name in ("keys", "values"))
        left = self._clear(stored, self._next(start), self.clock.step(start))
        if left is not None:
            self._fill(keys, values, stored.gather(1, left), left)

    def make_room(self, new: int) -> None:
        """Ready a settled layer for ``new`` columns: let buffers grow. Done for all layers in a row
        at the begin of a pass, which is much faster than between two layers."""
        if not self._buffers:
            return
        step = self.clock.step(self.clock.start)
        first, end = min(self.row_starts(step)), self.end + new
        if end - self.base > self._buffers["keys"].shape[2]:
            keep = self._needed_from(step)  # what lies before it is given up on the way
            self._move(keep, capacity_for(end - keep, self.size_first))
        keys, values = self._buffers["keys"], self._buffers["values"]
        fresh, live = (2, self.end - self.base, new), (2, first - self.base, end - first)
        self._room = (
            keys.narrow(*fresh), values.narrow(*fresh), keys.narrow(*live), values.narrow(*live)
        )  # fmt: skip

    def _needed_from(self, step: int) -> int:
        """First absolute column that step ``step`` or a later one can ask for."""
        return min(self.pad if self.recalls else self.row_starts(step))

    def note_positions(self, positions: Tensor) -> None:
        """Original columns of the tokens just appended, [B, new]; sliding layers only."""
        if self._positions is not None:
            new = positions.shape[1]
            self._positions[:, self.end - self.base - new : self.end - self.base] = positions

    def _move(self, first: int, capacity: int) -> None:
        """Copy the columns from ``first`` on into buffers of ``capacity`` columns."""
        live = slice(first - self.base, self.end - self.base)
        width = self.end - first
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            fresh = allocate(old, capacity, size_first=is_size_first(old))
            fresh[:, :, :width] = old[:, :, live]
            setattr(self, name, fresh)
        if self._positions is not None:
            fresh = self._positions.new_zeros(self._positions.shape[0], capacity)
            fresh[:, :width] = self._positions[:, live]
            self._positions = fresh
        self.base = first

    # Compiled decoding (engine/static.py) --------------------------------------------------------

    @property
    def buffer(self) -> Tensor:
        """The whole key buffer, [B, KV heads, capacity, head size]."""
        if self._keys is None:
            raise TrimStateError(f"layer {self.layer} of the cache is empty: no prompt was stored")
        return self._keys

    @property
    def stored_positions(self) -> Tensor:
        """Original columns over the whole buffer, [B, capacity]; sliding layers only."""
        if self._positions is None:
            raise TrimStateError(f"layer {self.layer} has no sliding window and keeps no positions")
        return self._positions

    def place_position(self, position: Tensor) -> None:
        """Note the original column of the token that a compiled step appends."""
        if self._positions is not None and self.next_column is not None:
            rows = self._positions.shape[0]
            self._positions.index_copy_(1, self.next_column, position.expand(rows, 1))

    def fix_room(self, first: int, bucket: int) -> None:
        """Make sure that one more column fits; if not, move what is live from ``first`` on into a
        buffer whose capacity is a multiple of ``bucket``, its free columns zero."""
        if self._keys is None or (
            self._is_static
            and self.end - self.base < self._keys.shape[2]
            and self._keys.shape[2] % bucket == 0
        ):
            return
        live = self.end - first
        self._move(first, -(-(live + bucket // 2) // bucket) * bucket)
        for buffer in (self._keys, self._values):
            if buffer is not None:
                buffer[:, :, live:] = 0
                torch._dynamo.mark_static_address(buffer)
        self._is_static = True

    def compact(self) -> None:
        """Free what annealing has released; a later crop cannot bring it back."""
        if self._keys is not None:
            first = self.ranked()[0]
            if first > self.base or self._keys.shape[2] > self.end - self.base:
                self._move(first, self.end - first)

    def reorder_visible(self, scores: Tensor) -> None:
        """Sort the visible visual entries of each row anew; all stored ones if the layer recalls.

        Args:
            scores: [B, columns] for the columns that :meth:`ranked` tells, higher is better.
        """
        if self._keys is None or self._values is None:
            return
        first, starts = self.ranked()
        width = self.end - first
        place = torch.arange(width, device=scores.device)
        lo = torch.tensor([start - first for start in starts], device=scores.device)[:, None]
        hi = torch.tensor(
            [pad + kept - first for pad, kept in zip(self.pad, self.kept, strict=True)],
            device=scores.device,
        )[:, None]
        visible = (place >= lo) & (place < hi)
        # Text keeps its place behind, what precedes a row's start its place before.
        key = torch.where(visible, scores.float(), torch.where(place >= hi, 2.0, -1.0))
        order = torch.argsort(key, dim=1, stable=True)
        span = max(pad + kept for pad, kept in zip(self.pad, self.kept, strict=True)) - first
        if span <= 1:
            return
        order = order[:, :span]
        for buffer in (self._keys, self._values):
            view = self._view(buffer, first)
            moved = torch.empty_like(view[:, :, :span])
            copy_columns(view, order, moved)
            view[:, :, :span] = moved
        if self._positions is not None:
            view = self.positions(first)
            view[:, :span] = view.gather(1, order)

    # What generate() asks for -------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Logical length: prompt and generated tokens as if nothing had been trimmed."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.20

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens (a positive value is a target length).

        Raises:
            TrimStateError: if that reaches into a trimmed prompt, or before what a compaction kept.
        """
        # transformers 5.17 gives a tensor; steps are looked up by number.
        number = int(tokens_to_remove)
        remove = -number if number <= 0 else self.length - number
        if remove <= 0 or self._keys is None:
            return
        if self.length - remove < self.clock.dense_from:
            raise TrimStateError(
                f"cannot crop {remove} tokens: the cache would end inside a trimmed prompt "
                f"({self.clock.dense_from} tokens). Start again from the whole prompt"
            )
        if self.length - remove < self._seen_from:
            raise TrimStateError(
                f"cannot crop {remove} tokens: text that those before them see has left the "
                "sliding window and is freed. Start again from the whole prompt"
            )
        self.length -= remove
        self.end -= remove
        self.clock.tokens = self.length - self.clock.start
        if min(self.row_starts(self.step)) < self.base:
            raise TrimStateError(
                "cannot crop past a compaction: the visual entries of that step are freed. Do not "
                "call compact() between steps that are rolled back"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._keys is not None:
            rows = torch.arange(self._keys.shape[0], device=self._keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self._keys is None or self._values is None:
            return
        keys = select_rows(self._keys, indices)
        values = select_rows(self._values, indices)
        if keys.shape == self._keys.shape:  # in place: compiled steps count on the address
            self._keys.copy_(keys)
            self._values.copy_(values)
        else:
            self._keys, self._values = keys, values
        if self._positions is not None:
            self._positions = self._positions.index_select(0, indices.to(self._positions.device))
        facts = list(zip(self.pad, self.kept, self.leading, self.images, strict=True))
        alike = len(set(facts)) == 1
        rows = [0] * len(indices) if alike else indices.tolist()  # no wait for the device if alike
        self.pad = tuple(facts[row][0] for row in rows)
        self.kept = tuple(facts[row][1] for row in rows)
        self.leading = tuple(facts[row][2] for row in rows)
        self.images = tuple(facts[row][3] for row in rows)
        self._starts = {}

    def offload(self) -> None:
        raise TrimStateError("offloaded caches are not supported: leave cache_implementation unset")

    prefetch = offload
