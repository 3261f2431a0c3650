"""The passes behind a prompt of decoders whose layers are not all alike.

A layer with a state needs no mask: nothing behind a prompt is padding. One that reads an earlier
layer's KV entries sees them as that layer did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.calls import AttentionCall
from st3.engine.compiled import CompiledStep
from st3.engine.masks import finish
from st3.engine.steps import JoinedStep, Step, TextStep


class _Mixed(Step[Any]):
    """Before a kind of step: what its layers without entries of their own are given."""

    _made: dict[int, Tensor | None]  # the masks of layers whose entries later ones read
    _kernel: Any = staticmethod(decode.decode_attention)
    _watched = True

    def leaves(self, layer: int) -> bool:
        return False

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        source = self.plan.wiring.sources[layer]
        if source is None:
            return None
        if source == layer:
            made = super()._mask(layer, hidden)  # type: ignore[safe-super]
            if made is None and self.plan.wiring.in_order:  # indexes ask for a mask
                past, step = self.stores[layer], self.timeline.step(self.timeline.start)
                keys = past.end - min(past.row_starts(step)) + 1
                seen = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=hidden.device)
                made = finish(seen, self.plan.kind, hidden.dtype)
            if layer in self.plan.wiring.shared_sources:
                self._made[layer] = made
            return made
        # As its source had it, whose end has moved since; the text model may have gone on with the
        # last columns alone.
        made = self._made[source]
        return None if made is None else made[..., -hidden.shape[-2] :, :]

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        wiring = self.plan.wiring
        if wiring.sources[layer] == layer and not wiring.in_order:
            return super().attend(layer, call)
        if self._watched:
            self.events.attention(layer, call, None)
        # (An index hands on a mask of its own making, which that kernel does not take.)
        plain = self.plan.kind == "sdpa" and not wiring.in_order
        if plain and decode.applies(call.query, call.given):
            call.base = self._kernel
        return call.run()


class MixedStep(_Mixed, TextStep):
    """Text behind a prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made = {}


class MixedJoinedStep(_Mixed, JoinedStep):
    """One token for each row of a joined batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made = {}


class MixedCompiledStep(_Mixed, CompiledStep):
    """A decode step in one graph."""

    _kernel = staticmethod(decode.matmul_decode)
    _watched = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made = {}
