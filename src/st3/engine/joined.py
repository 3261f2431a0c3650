"""The decode step of a joined batch: one token for each row, each row on its own clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.append import Behind, decode_attention_row
from st3.engine.clock import Clock
from st3.engine.masks import finish
from st3.engine.parallel import mean_over_ranks
from st3.engine.plan import Attend, Plan
from st3.engine.rows import JoinedLayer


class JoinedAppend(Behind):
    """A decode step of one token for each row of a joined batch."""

    def __init__(self, plan: Plan, cache: list[JoinedLayer], clock: Clock) -> None:
        self.plan, self.cache, self.clock = plan, cache, clock
        device = cache[0].buffer.device
        self.rows = cache[0].rows
        step = clock.step(clock.start)
        starts = [layer.row_starts(step) for layer in cache]
        self._first = [min(row) for row in starts]
        self._even = [max(row) == first for row, first in zip(starts, self._first, strict=True)]
        # One copy to the device for all layers: each copy makes the host wait.
        self._starts = torch.tensor(starts).to(device)  # [layers, B]
        for layer in cache:
            layer.make_room(1)
        self._logical: Tensor | None = None
        if any(window is not None for window in plan.windows):
            lengths = [row.length for row in self.rows]
            self._logical = torch.tensor(lengths, device=device)[:, None]  # [B, 1]
        due = [row.rerank and (row.steps + 1) % row.rerank == 0 for row in self.rows]
        self._due = torch.tensor([bool(d) for d in due], device=device) if any(due) else None

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        past, first = self.cache[layer], self._first[layer]
        window, logical = self.plan.windows[layer], self._logical
        logical = None if logical is None else logical.to(hidden.device)
        if window is not None and logical is not None and self.clock.start + 1 > window:
            # Original columns of keys and queries say what lies within the window.
            keys = torch.cat([past.positions(first), logical], dim=1)
            near = keys > logical - window
        elif self._even[layer]:
            return None
        else:
            near = None
        place = torch.arange(first, past.end + 1, device=hidden.device)
        seen = place >= self._starts[layer].to(hidden.device)[:, None]
        if near is not None:
            seen = seen & near
        return finish(seen[:, None, None], self.plan.kind, hidden.dtype)

    def attend(
        self, layer: int, base: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Run the attention ``base``; rank visible visual tokens anew in the rows whose time it
        is."""
        past = self.cache[layer]
        if self.plan.windows[layer] is not None and self._logical is not None:
            past.note_positions(self._logical.to(key.device))
        if self.plan.kind == "sdpa" and decode.applies(query, kwargs):
            base = decode.decode_attention
        output = base(module, query, key, value, mask, **kwargs)
        if self._due is not None:
            with torch.no_grad():
                scores = decode_attention_row(query, key, past, kwargs)
                scores = mean_over_ranks(scores, self.plan.ranks)
                # The other rows are "ranked" by the order that they have.
                order = torch.linspace(0, 1, scores.shape[1], device=scores.device)
                past.reorder_visible(
                    torch.where(self._due[:, None].to(scores.device), scores, order)
                )
        return output
