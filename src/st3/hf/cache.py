"""Transformers' cache protocol, answered by the engine's stores.

Layers are swapped one by one into generate()'s own DynamicCache: no argument of generate() changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from st3.engine.kv.base import Store
from st3.engine.kv.joined import JoinedStore
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Phase
from st3.errors import TrimStateError, UnsupportedModelError

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


class CacheSeam:
    """A transformers cache, as the engine sees it (:class:`st3.engine.calls.Cache`).

    Args:
        own: the decoder layers that have KV entries of their own; the cache's other layers (states,
            and stand-ins for layers that share entries) are left in their places.
        pads: gives the padding of each row of an earlier turn, by its logical length.
    """

    def __init__(
        self,
        cache: Cache,
        own: Sequence[int],
        pads: Callable[[int, int], list[int]] | None = None,
    ) -> None:
        self.cache = cache
        self._own = own
        self._pads = pads

    @property
    def stores(self) -> dict[int, Store]:
        return stores_of(self.cache)

    def entry_bytes(self) -> tuple[int, ...]:
        own = set(self._own)
        pairs = [(la.keys, la.values) if i in own else () for i, la in enumerate(self.cache.layers)]
        return tuple(
            sum(t.shape[1] * t.shape[-1] * t.element_size() for t in pair) for pair in pairs
        )

    def check(self) -> None:
        """Raise :class:`~st3.UnsupportedModelError` unless its layers can be exchanged."""
        if type(self.cache) is not DynamicCache or getattr(self.cache, "offloading", False):
            raise UnsupportedModelError(
                f"{type(self.cache).__name__} is not supported: leave cache_implementation unset, "
                "so that generate() makes a DynamicCache"
            )
        for layer in self._layers():
            # One of ours was reset, and may stem from another policy.
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, TrimmedLayer):
                raise UnsupportedModelError(
                    f"a cache layer of type {type(layer).__name__} cannot be trimmed: leave "
                    "cache_implementation unset"
                )

    def install(self, make: Callable[[int], KVStore]) -> dict[int, KVStore]:
        self.check()
        past = int(self.cache.get_seq_length())
        fresh = {layer: make(layer) for layer in self._own}
        if past:
            for layer, old in zip(self._own, self._layers(), strict=True):
                pads = [0] * old.keys.shape[0]
                if self._pads is not None:
                    pads = self._pads(past, len(pads))
                fresh[layer].adopt(old.keys, old.values, pads, past)
        layers = self.cache.layers
        # A cache made without a config gets its layers only when they are first written to.
        layers.extend(DynamicLayer() for _ in range(len(layers), max(self._own) + 1))
        for layer, store in fresh.items():
            layers[layer] = TrimmedLayer(store)
        return fresh

    def _layers(self) -> list[Any]:
        """The cache's own layers for those, as far as it has any yet."""
        layers = self.cache.layers
        return [layers[layer] for layer in self._own if layer < len(layers)]


def stores_of(cache: Cache | None) -> dict[int, Store]:
    """The engine's stores in a cache, by decoder layer."""
    layers = getattr(cache, "layers", ())
    return {i: la.store for i, la in enumerate(layers) if isinstance(la, TrimmedLayer)}


def compact(cache: Cache | None) -> int:
    """Free the entries that annealing has released. Changes the cache.

    Returns:
        the bytes freed.

    Raises:
        TrimStateError: while a pass writes to it.
    """
    stores = [store for store in stores_of(cache).values() if isinstance(store, KVStore)]
    if stores and stores[0].timeline.phase is not Phase.IDLE:
        raise TrimStateError("a pass is under way: call compact() between passes")
    before = sum(store.footprint()[1] for store in stores)
    for store in stores:
        store.compact()
    return before - sum(store.footprint()[1] for store in stores)


def new_cache(config: Any) -> DynamicCache:
    """An empty cache such as generate() makes for a text model."""
    return DynamicCache(config=config)


class JoinedCache(DynamicCache):
    """A cache of joined stores, in the order of the decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[TrimmedLayer] = []

    @property
    def joined(self) -> list[JoinedStore]:
        """The stores."""
        return [layer.store for layer in self.layers if isinstance(layer.store, JoinedStore)]

    @joined.setter
    def joined(self, stores: list[JoinedStore]) -> None:
        self.layers = [TrimmedLayer(store) for store in stores]

    def add(self, store: JoinedStore) -> None:
        """Put a store behind the last."""
        self.layers.append(TrimmedLayer(store))
