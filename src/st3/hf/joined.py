"""The cache of a joined batch."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache

from st3.engine.kv.base import Store
from st3.hf.layer import TrimmedLayer


class JoinedCache(DynamicCache):
    """A cache of joined stores, in the order of the decoder layers; layers with states, and
    stand-ins of layers that share entries, are transformers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Any] = []

    @property
    def held(self) -> list[Any]:
        """For each decoder layer its store, or the layer of the cache where it has none."""
        return [la.store if isinstance(la, TrimmedLayer) else la for la in self.layers]

    def add(self, held: Any) -> None:
        """Put a store, or a layer that has none, behind the last."""
        self.layers.append(TrimmedLayer(held) if isinstance(held, Store) else held)

    def clear(self) -> None:
        """Let go of all layers."""
        self.layers = []
