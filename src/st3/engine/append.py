"""The pass of text behind a trimmed prompt, decoder layer by decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.cache import TrimmedLayer
from st3.engine.clock import Clock
from st3.engine.masks import Starts, decode_mask, finish
from st3.engine.parallel import mean_over_ranks
from st3.engine.plan import Attend, Plan
from st3.errors import UnsupportedModelError
from st3.methods.scores import LayerView


class Behind:
    """What passes behind a stored prompt have in common."""

    def enter(
        self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Give the layer the mask of its own live columns."""
        kwargs["position_ids"] = None
        kwargs["attention_mask"] = self._mask(layer, hidden)
        return (hidden, *args)

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        raise NotImplementedError


@dataclass
class Append(Behind):
    """Text behind a trimmed prompt: decode steps, candidates of assisted decoding, a next turn."""

    plan: Plan
    cache: list[TrimmedLayer]
    clock: Clock
    known: dict[Starts, Tensor]

    def __post_init__(self) -> None:
        step, single = self.clock.step(self.clock.start), self.clock.tokens == 1
        rows = [layer.row_starts(step) for layer in self.cache]
        self._unmasked = [
            single and window is None and min(row) == max(row)
            for row, window in zip(rows, self.plan.windows, strict=True)
        ]
        for layer in self.cache:
            layer.make_room(self.clock.tokens)

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        if self._unmasked[layer]:
            return None
        past = self.cache[layer]
        queries = hidden.shape[1]
        window = self.plan.windows[layer]
        starts = [past.row_starts(self.clock.step(self.clock.start + q)) for q in range(queries)]
        first, end = min(starts[0]), past.end + queries
        kind, dtype, device = self.plan.kind, hidden.dtype, hidden.device
        if window is None or self.clock.start + queries <= window:
            return decode_mask(starts, first, end, kind, dtype, device, self.known)
        # Original columns of keys and queries say what lies within the window.
        fresh = torch.arange(self.clock.start, self.clock.start + queries, device=device)
        old = past.positions(first).to(device)
        keys = torch.cat([old, fresh.expand(old.shape[0], -1)], dim=1)
        near = keys[:, None, None, :] > (fresh - window)[:, None]
        seen = decode_mask(starts, first, end, "sdpa", dtype, device, self.known)
        return finish(near if seen is None else near & seen, kind, dtype)

    def attend(
        self, layer: int, base: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Run the attention ``base``; rank the visible visual tokens anew when it is time."""
        past = self.cache[layer]
        if self.plan.windows[layer] is not None:
            fresh = torch.arange(
                self.clock.start, self.clock.start + self.clock.tokens, device=key.device
            )
            past.note_positions(fresh.expand(key.shape[0], -1))
        if self.plan.kind == "sdpa" and decode.applies(query, kwargs):
            base = decode.decode_attention
        output = base(module, query, key, value, mask, **kwargs)
        every = self.plan.rerank
        if every and self.clock.tokens == 1 and self.clock.step(self.clock.start) % every == 0:
            with torch.no_grad():
                row = decode_attention_row(query, key, past, kwargs)
                past.reorder_visible(mean_over_ranks(row, self.plan.ranks))
        return output


def decode_attention_row(
    query: Tensor, key: Tensor, past: TrimmedLayer, kwargs: dict[str, Any]
) -> Tensor:
    """The current token's attention over the columns that a new ranking covers, mean over heads,
    [B, K]; ``key`` are the live ones."""
    batch = key.shape[0]
    first, row_starts = past.ranked()
    if past.recalls:
        if past.buffer.shape[-1] != key.shape[-1]:
            raise UnsupportedModelError(
                "this model caches a compressed form of its keys, which cannot be ranked anew: "
                "leave recall_every at None, or use another policy"
            )
        key = past.keys_from(first)
    starts = torch.tensor(row_starts, device=key.device)[:, None]
    place = torch.arange(first, past.end, device=key.device)
    nothing = torch.zeros(batch, 1, dtype=torch.bool, device=key.device)
    view = LayerView.of(
        query,
        key,
        kwargs,
        layer=past.layer,
        hidden=None,
        visual=nothing,
        ordinal=nothing.long(),
        last=torch.zeros(batch, dtype=torch.long, device=key.device),
        key_valid=place >= starts,
    )
    return view.last_row_logits().softmax(dim=-1).mean(dim=1)
