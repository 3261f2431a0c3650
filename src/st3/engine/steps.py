"""The passes of text behind a trimmed prompt, decoder layer by decoder layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.calls import AttentionCall, LayerInputs
from st3.engine.events import Events
from st3.engine.kv.base import Store
from st3.engine.kv.joined import JoinedStore
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Timeline
from st3.engine.masks import Starts, decode_mask, finish
from st3.engine.parallel import mean_over_ranks
from st3.engine.plan import Plan
from st3.errors import UnsupportedModelError
from st3.methods.scores import LayerView
from st3.methods.upload import upload

S = TypeVar("S", bound=Store)


class Step(ABC, Generic[S]):
    """What all passes behind a prompt have in common: each layer gets the mask of its own visible
    columns."""

    def __init__(self, plan: Plan, stores: dict[int, S], timeline: Timeline, events: Events):
        self.plan, self.stores, self.timeline, self.events = plan, stores, timeline, events

    def leaves(self, layer: int) -> bool:
        return False

    def enter(self, layer: int, inputs: LayerInputs) -> None:
        inputs.mask, inputs.changed = self._mask(layer, inputs.hidden), True

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Run the attention over the store, by the kernel that its memory is laid out for."""
        store = self.stores[layer]
        if self.plan.windows[layer] is not None:
            store.note_positions(self._fresh_positions(call))
        self.events.attention(layer, call, None)
        if self.plan.kind == "sdpa" and decode.applies(call.query, call.given):
            call.base = decode.decode_attention
        output = call.run()
        self._rerank(store, call)
        return output

    @abstractmethod
    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        """The mask of the layer's columns, in the kernel's form; None where all see all."""

    @abstractmethod
    def _fresh_positions(self, call: AttentionCall) -> Tensor:
        """Original columns of the pass's tokens, [B, new]."""

    def _rerank(self, store: S, call: AttentionCall) -> None:
        """Rank visible visual tokens anew, if it is time."""


class TextStep(Step[KVStore]):
    """Decode steps, candidates of assisted decoding, a next turn of text.

    Args:
        known: device copies of row starts, kept from pass to pass.
    """

    def __init__(
        self,
        plan: Plan,
        stores: dict[int, KVStore],
        timeline: Timeline,
        events: Events,
        known: dict[Starts, Tensor],
    ) -> None:
        super().__init__(plan, stores, timeline, events)
        self.known = known
        step, single = timeline.step(timeline.start), timeline.tokens == 1
        self._unmasked = {}
        for layer, store in stores.items():
            starts = store.row_starts(step)
            even = min(starts) == max(starts)
            self._unmasked[layer] = single and plan.windows[layer] is None and even
        with events.span("grow"):
            for store in stores.values():
                store.make_room(timeline.tokens)

    def leaves(self, layer: int) -> bool:
        # (flash attention reads more out of a layer's inputs than the mask)
        return self.plan.kind == "sdpa" and self._unmasked.get(layer, False)

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        if self._unmasked[layer]:
            return None
        past, line = self.stores[layer], self.timeline
        queries = hidden.shape[-2]
        window = self.plan.windows[layer]
        starts = [past.row_starts(line.step(line.start + q)) for q in range(queries)]
        first, end = min(starts[0]), past.end + queries
        kind, dtype, device = self.plan.kind, hidden.dtype, hidden.device
        if window is None or line.start + queries <= window:
            return decode_mask(starts, first, end, kind, dtype, device, self.known)
        # Original columns of keys and queries say what lies within the window.
        fresh = torch.arange(line.start, line.start + queries, device=device)
        old = past.positions(first).to(device)
        keys = torch.cat([old, fresh.expand(old.shape[0], -1)], dim=1)
        near = keys[:, None, None, :] > (fresh - window)[:, None]
        seen = decode_mask(starts, first, end, "sdpa", dtype, device, self.known)
        return finish(near if seen is None else near & seen, kind, dtype)

    def _fresh_positions(self, call: AttentionCall) -> Tensor:
        line = self.timeline
        fresh = torch.arange(line.start, line.start + line.tokens, device=call.key.device)
        return fresh.expand(call.key.shape[0], -1)

    def _rerank(self, store: KVStore, call: AttentionCall) -> None:
        every, line = self.plan.rerank, self.timeline
        if every and line.tokens == 1 and line.step(line.start) % every == 0:
            with torch.no_grad():
                row = decode_attention_row(store, call.query, call.key, call.given)
                store.rerank(mean_over_ranks(row, self.plan.ranks))


class JoinedStep(Step[JoinedStore]):
    """One token for each row of a joined batch, each row on its own timeline."""

    def __init__(
        self, plan: Plan, stores: dict[int, JoinedStore], timeline: Timeline, events: Events
    ) -> None:
        super().__init__(plan, stores, timeline, events)
        sequences = next(iter(stores.values())).sequences
        device = next(iter(stores.values())).filled.keys.device
        step = timeline.step(timeline.start)
        starts = [store.row_starts(step) for store in stores.values()]
        self._first = dict(zip(stores, map(min, starts), strict=True))
        self._even = {layer: len(set(row)) == 1 for layer, row in zip(stores, starts, strict=True)}
        # One copy to the device for all layers: each copy makes the host wait.
        self._starts = dict(zip(stores, upload(starts, device), strict=True))  # [B] each
        with events.span("grow"):
            for store in stores.values():
                store.make_room(1)
        self._logical: Tensor | None = None
        if any(window is not None for window in plan.windows):
            lengths = [sequence.length for sequence in sequences]
            self._logical = upload(lengths, device)[:, None]  # [B, 1]
        due = [bool(s.rerank and (s.steps + 1) % s.rerank == 0) for s in sequences]
        self._due = upload(due, device) if any(due) else None

    def leaves(self, layer: int) -> bool:
        plain = self.plan.kind == "sdpa" and self.plan.windows[layer] is None
        return plain and self._even.get(layer, False)

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        past, first = self.stores[layer], self._first[layer]
        window, logical, near = self.plan.windows[layer], self._logical, None
        if window is not None and logical is not None and self.timeline.start + 1 > window:
            # Original columns of keys and queries say what lies within the window.
            logical = logical.to(hidden.device)
            keys = torch.cat([past.positions(first), logical], dim=1)
            near = keys > logical - window
        elif self._even[layer]:
            return None
        place = torch.arange(first, past.end + 1, device=hidden.device)
        seen = place >= self._starts[layer].to(hidden.device)[:, None]
        if near is not None:
            seen = seen & near
        return finish(seen[:, None, None], self.plan.kind, hidden.dtype)

    def _fresh_positions(self, call: AttentionCall) -> Tensor:
        if self._logical is None:
            raise ValueError("only layers with a sliding window keep positions")
        return self._logical.to(call.key.device)

    def _rerank(self, store: JoinedStore, call: AttentionCall) -> None:
        """Only the rows whose time it is: the others are "ranked" by the order that they have."""
        if self._due is None:
            return
        with torch.no_grad():
            scores = decode_attention_row(store, call.query, call.key, call.given)
            scores = mean_over_ranks(scores, self.plan.ranks)
            order = torch.linspace(0, 1, scores.shape[1], device=scores.device)
            store.rerank(torch.where(self._due[:, None].to(scores.device), scores, order))


def decode_attention_row(
    store: Store, query: Tensor, key: Tensor, given: Mapping[str, Any]
) -> Tensor:
    """The current token's attention over the columns that a new ranking covers, mean over heads,
    [B, K]; ``key`` are the visible ones."""
    batch = key.shape[0]
    first, row_starts = store.ranked()
    if store.recalls:
        buffer = store.filled
        if buffer.keys.shape[-1] != key.shape[-1]:
            raise UnsupportedModelError(
                "this model caches a compressed form of its keys, which cannot be ranked anew: "
                "leave recall_every at None, or use another policy"
            )
        key = buffer.view(buffer.keys, first)
    starts = upload(row_starts, key.device)[:, None]
    place = torch.arange(first, store.end, device=key.device)
    nothing = torch.zeros(batch, 1, dtype=torch.bool, device=key.device)
    view = LayerView.of(
        query,
        key,
        given,
        layer=store.layer,
        hidden=None,
        visual=nothing,
        ordinal=nothing.long(),
        last=torch.zeros(batch, dtype=torch.long, device=key.device),
        key_valid=place >= starts,
    )
    return view.last_row_logits().softmax(dim=-1).mean(dim=1)
