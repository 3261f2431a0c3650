"""Transformers' cache protocol, answered by the engine's stores.

Layers are swapped one by one into generate()'s own DynamicCache: no argument of generate() changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from st3.engine.kv.base import Store
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Phase
from st3.errors import TrimStateError, UnsupportedModelError
from st3.hf.indexed import IndexedLayer, has_index, index_keys_of
from st3.hf.layer import OUTSIDE as OUTSIDE
from st3.hf.layer import TrimmedLayer as TrimmedLayer


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
            known = (DynamicLayer, DynamicSlidingWindowLayer, TrimmedLayer)
            if type(layer) not in known and not has_index(layer):
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
            old = layers[layer]
            if has_index(old):
                layers[layer] = IndexedLayer(store, index_keys_of(old) if past else None)
            else:
                layers[layer] = TrimmedLayer(store)
        return fresh

    def renew(self, config: Any) -> None:
        """Give a cache that was reset plain layers again, for a prompt that is not trimmed."""
        self.cache.layers = new_cache(config).layers

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
