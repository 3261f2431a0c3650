"""The memory of one layer's KV entries, preallocated: nothing here knows what is visible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.engine.kv.layout import (
    allocate,
    capacity_for,
    copy_columns,
    is_size_first,
    select_rows,
)

# Where a pass writes its keys and values, and the keys and values that attention then reads.
Room = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class KVBuffer:
    """Keys and values [B, KV heads, capacity, head size], of which columns are in use.

    Columns are counted from the first one ever stored: ``base`` is the first that is still
    allocated, ``end`` the one behind the last in use.

    Attributes:
        positions: original columns [B, capacity]; layers with a sliding window only.
        size_first: how keys lie in memory, see :mod:`st3.engine.kv.layout`.
        bucket: of memory that is as compiled steps want it, else 0.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None
    base: int
    end: int
    size_first: bool = False
    bucket: int = 0

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        order: Tensor | None,
        positions: Tensor | None,
        base: int,
        end: int,
        size_first: bool,
    ) -> KVBuffer:
        """New memory, with room for more, that holds the columns ``order`` [B, end - base] of
        ``key`` and ``value``, all if None; ``positions`` are in that order already."""
        width = end - base
        capacity = capacity_for(width, size_first)
        keys = allocate(key, capacity, size_first=size_first)
        values = allocate(value, capacity)
        copy_columns(key, order, keys[:, :, :width])
        copy_columns(value, order, values[:, :, :width])
        own = None
        if positions is not None:
            own = positions.new_zeros(len(positions), capacity)
            own[:, :width] = positions
        return cls(keys, values, own, base, end, size_first)

    @property
    def capacity(self) -> int:
        """Columns allocated."""
        return int(self.keys.shape[2])

    @property
    def rows(self) -> int:
        return int(self.keys.shape[0])

    @property
    def width(self) -> int:
        """Columns in use."""
        return self.end - self.base

    def view(self, buffer: Tensor, first: int) -> Tensor:
        """The columns in use from ``first`` on, of keys or values."""
        return buffer[:, :, first - self.base : self.width]

    def position_view(self, first: int) -> Tensor | None:
        """Original columns of the entries from ``first`` on, [B, columns]."""
        return None if self.positions is None else self.positions[:, first - self.base : self.width]

    def room(self, first: int, new: int) -> Room:
        """For ``new`` columns, which must fit, and attention that reads from ``first`` on."""
        fresh = (2, self.width, new)
        live = (2, first - self.base, self.end + new - first)
        return (
            self.keys.narrow(*fresh), self.values.narrow(*fresh),
            self.keys.narrow(*live), self.values.narrow(*live),
        )  # fmt: skip

    def move(self, first: int, capacity: int) -> None:
        """Copy the columns from ``first`` on into memory for ``capacity`` columns; what stands
        before them is freed."""
        live, width = slice(first - self.base, self.width), self.end - first

        def moved(old: Tensor) -> Tensor:
            fresh = allocate(old, capacity, size_first=is_size_first(old))
            fresh[:, :, :width] = old[:, :, live]
            return fresh

        self.keys, self.values = moved(self.keys), moved(self.values)
        if self.positions is not None:
            fresh = self.positions.new_zeros(self.rows, capacity)
            fresh[:, :width] = self.positions[:, live]
            self.positions = fresh
        self.base, self.bucket = first, 0

    def gather(self, first: int, order: Tensor) -> None:
        """Put the columns from ``first`` on in the ``order`` [B, M], in place."""
        span = order.shape[1]
        for buffer in (self.keys, self.values):
            view = self.view(buffer, first)
            moved = torch.empty_like(view[:, :, :span])
            copy_columns(view, order, moved)
            view[:, :, :span] = moved
        positions = self.position_view(first)
        if positions is not None:
            positions[:, :span] = positions.gather(1, order)

    def select_rows(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in place where their number stays: compiled steps count on the
        address."""
        keys, values = select_rows(self.keys, indices), select_rows(self.values, indices)
        if keys.shape == self.keys.shape:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
        if self.positions is not None:
            self.positions = self.positions.index_select(0, indices.to(self.positions.device))

    def make_writable(self) -> None:
        """Outside of inference_mode, memory that was made inside of it cannot be written: copy it
        once."""
        if not self.keys.is_inference() or torch.is_inference_mode_enabled():
            return
        self.bucket = 0
        self.keys, self.values = self.keys.clone(), self.values.clone()
        if self.positions is not None:
            self.positions = self.positions.clone()
