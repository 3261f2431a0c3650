"""Cache layers of attention with an index, whose keys lie beside the KV entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from st3.engine.kv.base import Store
from st3.hf.layer import TrimmedLayer


class IndexedLayer(TrimmedLayer):
    """One whose layer has an index: its keys lie beside the KV entries, in the same columns."""

    def __init__(self, store: Store, index_keys: Tensor | None = None) -> None:
        super().__init__(store)
        self.index_keys = index_keys  # [B, (1,) columns, size]
        self._columns = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self._columns = keys.shape[2]
        return keys, values

    def update_index(self, new: Tensor) -> Tensor:
        """Take a pass's index keys; those of the columns that :meth:`update` has just given."""
        held = new if self.index_keys is None else torch.cat([self.index_keys, new], dim=-2)
        self.index_keys = held[..., -self._columns :, :]  # padding of all rows may have left
        return self.index_keys

    update_indexer = update_index  # transformers' own name; the other is MiniMax's

    def crop(self, tokens_to_remove: int) -> None:
        before = self.store.length
        super().crop(tokens_to_remove)
        if self.index_keys is not None and self.store.length < before:
            self.index_keys = self.index_keys[..., : self.store.length - before, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.index_keys is not None:
            rows = indices.to(self.index_keys.device)
            self.index_keys = self.index_keys.index_select(0, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.index_keys is not None:
            self.index_keys = self.index_keys.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        super().reset()
        self.index_keys = None


def index_mask(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, given: Mapping[str, Any]
) -> Tensor | None:
    """The mask of an attention call, narrowed to the keys that the layer's index chose. Models do
    that themselves where their kernel has one of the names "sdpa" and "eager", and hand the choice
    on to any other.

    Args:
        mask: [B or 1, 1, Q, K], bool or to be added; None where the choice holds it.
        given: the call's keyword arguments: ``indices`` [B, Q, chosen] or ``block_indices``.
    """
    batch, _, queries, _ = query.shape
    keys, chosen = key.shape[2], given.get("indices")
    if chosen is None:
        places = given.get("position_ids")
        if places is None:
            places = torch.arange(keys - queries, keys, device=query.device)
        places = (places if places.dim() > 1 else places[None]).expand(batch, -1)
        found: Tensor = module.indexer.build_block_mask(
            given["block_indices"], mask, keys, query.dtype, query.device, places
        )
        return found
    others = torch.ones(batch, queries, keys, dtype=torch.bool, device=query.device)
    others = others.scatter(-1, chosen.long(), False)[:, None]
    if mask is None:
        return ~others
    if mask.dtype == torch.bool:
        return mask & ~others
    return mask.masked_fill(others, torch.finfo(query.dtype).min)


def has_index(layer: Any) -> bool:
    return hasattr(layer, "update_indexer") or hasattr(layer, "update_index")


def index_keys_of(layer: Any) -> Tensor | None:
    found: Tensor | None = getattr(layer, "indexer_keys", getattr(layer, "idx_keys", None))
    return found
