"""How many bytes of KV cache a request will hold at most, and who may run together.

The rows of a batch share buffers, as wide as the widest of them. So requests of like shapes run in
one batch (a *lane*), whatever their policies are; one that would waste more than a share of its
own bytes on padding opens a lane of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from st3.cost import TextDims
from st3.cost.kv import bytes_per_value
from st3.engine.kv.joined import VisibleCounts
from st3.engine.kv.layout import capacity_for
from st3.hf.cache import new_cache
from st3.hf.call import CACHE
from st3.hf.states import state_bytes

Columns = tuple[int, ...]
"""For each decoder layer the columns that a row needs at most, free ones behind it included."""


def columns_at_peak(counts: VisibleCounts, text: int, max_tokens: int) -> Columns:
    """A row's columns at its longest: its policy's visible tokens, its text, its answer.

    Args:
        text: prompt tokens that are not visual.
        max_tokens: of the answer; the last one is never fed back.
    """
    most = (text + peak for peak in counts.peaks(max_tokens - 1))
    return tuple(max(capacity_for(n), capacity_for(n, size_first=True)) for n in most)


def entry_bytes(model: Any, layers: int) -> tuple[int, ...]:
    """Bytes of one KV entry, key and value, in each decoder layer."""
    try:
        dims = TextDims.from_config(model.config)
    except ValueError:  # a decoder without a cost model: look at what it stores
        return _probed(model, layers)
    size = bytes_per_value(model.dtype)
    return tuple(layer.held * size for layer in dims.layers)


def row_bytes(model: Any) -> int:
    """Bytes of a row's states, which are the same for every prompt."""
    return sum(map(state_bytes, _probe(model).layers))


def _probed(model: Any, layers: int) -> tuple[int, ...]:
    held = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in _probe(model).layers[:layers]
    ]
    held += [(None, None)] * (layers - len(held))
    return tuple(
        sum(t.shape[1] * t.shape[3] * t.element_size() for t in pair if t is not None)
        for pair in held
    )


def _probe(model: Any) -> Any:
    """The cache of a prompt of one token."""
    import torch

    cache = new_cache(model.config.get_text_config(decoder=True))
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=token, use_cache=True, **{CACHE: cache})
    return cache


@dataclass(frozen=True)
class Budget:
    """Bytes for KV entries.

    Attributes:
        total: how many there are.
        entries: bytes of one entry in each decoder layer.
        slack: share of its own bytes that a request may cost a lane in padding.
        states: bytes of each row besides, whatever its length.
    """

    total: int
    entries: tuple[int, ...]
    slack: float = 0.25
    states: int = 0

    def bytes(self, rows: Sequence[Columns]) -> int:
        """Bytes of a lane's buffers, at most."""
        return len(rows) * self._row(widest(rows)) if rows else 0

    def _row(self, columns: Columns) -> int:
        entries = sum(size * n for size, n in zip(self.entries, columns, strict=True))
        return self.states + entries

    def place(self, lanes: Sequence[Sequence[Columns]], new: Columns, most_rows: int) -> int | None:
        """The lane for a new request: its index, ``len(lanes)`` for one of its own, None if it must
        wait."""
        held = [self.bytes(rows) for rows in lanes]
        free = self.total - sum(held)
        if sum(map(len, lanes)) >= most_rows:
            return None
        own = self._row(new)
        costs = [self.bytes([*rows, new]) - now for rows, now in zip(lanes, held, strict=True)]
        best = min(range(len(lanes)), key=lambda lane: costs[lane], default=None)
        if best is not None and costs[best] <= min(free, (1 + self.slack) * own):
            return best
        return len(lanes) if own <= free else None


def widest(rows: Sequence[Columns]) -> Columns:
    """The columns of the buffers that hold all of these rows."""
    return tuple(map(max, zip(*rows, strict=True)))
