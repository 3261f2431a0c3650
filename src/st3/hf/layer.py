"""A layer of transformers' cache, answered by the engine's store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from st3.engine.kv.base import Store
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Phase
from st3.errors import TrimStateError

OUTSIDE = (
    "this cache was trimmed by st3 and can only be continued by the model while it is trimmed: "
    "call generate() inside the `with st3.trim(...)` block, under a policy that drops tokens"
)


class TrimmedLayer(CacheLayerMixin):
    """One layer of a transformers cache, held by a store.

    Lengths are logical, as if nothing had been trimmed, in every layer at all times: generate()'s
    masks and positions stay right.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # lengths are logical in every layer: masks are never cut to a window
    supports_early_init = False

    def __init__(self, store: Store) -> None:
        # No super().__init__(): it assigns `keys` and `values`, which are views here.
        self.store = store

    # What is there ------------------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        return bool(self.store.rows)

    @property
    def keys(self) -> Tensor | None:
        """The visible columns [B, KV heads, columns, head size], padding of shorter rows included;
        before the first further token the prompt's, in its own order. A view."""
        return self._view("keys", "key")

    @property
    def values(self) -> Tensor | None:
        """As :attr:`keys`."""
        return self._view("values", "value")

    def _view(self, buffer_name: str, pending_name: str) -> Tensor | None:
        store = self.store
        if store.buffer is not None:
            found: Tensor = getattr(store.buffer, buffer_name)
            return store.buffer.view(found, store.first_visible())
        pending = store.pending if isinstance(store, KVStore) and store.rows else None
        return None if pending is None else getattr(pending, pending_name)

    def get_seq_length(self) -> int:
        return self.store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.20

    # What changes it ----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers are made when a prompt is written, when it is known what is kept."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a pass's keys and values [B, KV heads, new, head size]; what attention reads."""
        store = self.store
        if isinstance(store, KVStore):
            if store.next_column is not None:
                return store.append_fixed(key_states, value_states)
            if store.timeline.phase is Phase.PREFILL:
                store.receive(key_states, value_states)
                return key_states, value_states
        if store.timeline.phase is Phase.IDLE:
            raise TrimStateError(OUTSIDE)
        return store.append(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens (a positive value is a target length).

        Raises:
            TrimStateError: if that reaches into a trimmed prompt, or before what a compaction kept.
        """
        number = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        self._own("cropped").crop(number if number > 0 else self.store.length + number)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._own("changed row by row").select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.store.rows)).repeat_interleave(repeats)
        self._own("repeated").select_rows(rows)

    def reset(self) -> None:
        self.store.reset()

    def offload(self) -> None:
        raise TrimStateError("offloaded caches are not supported: leave cache_implementation unset")

    prefetch = offload

    def _own(self, done: str) -> KVStore:
        if not isinstance(self.store, KVStore):
            raise TrimStateError(f"a joined batch cannot be {done}: its rows decode step by step")
        return self.store
