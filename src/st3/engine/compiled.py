"""Compiled decoding: one graph for all steps, over buffers of fixed size.

While text is generated nothing that Python decides may change from step to step, or torch.compile
builds a new graph and CUDA graphs cannot be replayed. So each layer's buffer is given room for the
tokens to come (rounded up to a *bucket*), attention reads all of it, and what is live is said by
two small tensors that the host fills before each step: the first live column of each row and the
column of the new token, per layer.

The price is that annealed entries are still read, masked, until the next bucket. Use it where
decoding is bound by the launching of kernels, not by the reading of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.calls import AttentionCall
from st3.engine.events import Events
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Timeline
from st3.engine.masks import finish
from st3.engine.plan import Plan
from st3.engine.steps import Step
from st3.errors import UnsupportedModelError
from st3.methods.upload import upload


class CompiledStep(Step[KVStore]):
    """A decode step of one token per row, without a decision of Python's that could change. One
    object serves all steps of a cache; between them it holds no entries.

    Attributes:
        starts: [layers, B] int64 on the device, first visible column of each row in its buffer.
        ends: [layers] int64 on the device, the new token's column.
        position: [] int64 on the device, the new token's logical position.
    """

    def __init__(self, plan: Plan, timeline: Timeline, bucket: int, events: Events) -> None:
        super().__init__(plan, {}, timeline, events)
        self.bucket = bucket
        self.starts = self.ends = self.position = torch.empty(0)
        self._index: dict[int, int] = {}  # of a decoder layer among those that have a store

    def prepare(self, stores: dict[int, KVStore]) -> None:
        """Fill in the step's tensors; give full buffers another bucket."""
        self.stores = stores
        first = next(iter(stores.values())).filled
        self._make_tensors(len(stores), first.rows, first.keys.device)
        step = self.timeline.step(self.timeline.start)
        starts = []
        for store in stores.values():
            rows = store.row_starts(step)
            store.make_fixed_room(min(rows), self.bucket)
            starts.append([max(0, row - store.filled.base) for row in rows])
        self.starts.copy_(upload(starts, first.keys.device))
        self.ends.copy_(upload([s.filled.width for s in stores.values()], first.keys.device))
        self.position.fill_(self.timeline.start)
        for index, (layer, store) in enumerate(stores.items()):
            self._index[layer] = index
            store.next_column = self.ends[index : index + 1]

    def _make_tensors(self, layers: int, rows: int, device: torch.device) -> None:
        if self.starts.shape == (layers, rows):
            return
        self.starts = torch.zeros(layers, rows, dtype=torch.long, device=device)
        self.ends = torch.zeros(layers, dtype=torch.long, device=device)
        self.position = torch.zeros((), dtype=torch.long, device=device)
        for tensor in (self.starts, self.ends, self.position):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs then read it in place

    @property
    def places(self) -> tuple[int, ...]:
        """Where everything lies that the step reads and writes in place: work that was recorded for
        one step holds for another whose places are the same."""
        buffers = [store.filled for store in self.stores.values()]
        tensors = [self.starts, self.ends, self.position]
        for buffer in buffers:
            held = (buffer.keys, buffer.values, buffer.positions)
            tensors += [tensor for tensor in held if tensor is not None]
        return tuple(number for t in tensors for number in (t.data_ptr(), *t.shape))

    def done(self) -> None:
        """The compiled step has run: let go of the cache, which may end before the trimmer does."""
        for store in self.stores.values():
            store.next_column = None
            store.filled.end += 1
            store.length = self.timeline.start + 1
        self.stores = {}

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        """A mask over the whole of the layer's buffer."""
        store = self.stores[layer]
        column = torch.arange(store.filled.capacity, device=hidden.device)
        index = self._index[layer]
        seen = (column >= self.starts[index][:, None]) & (column <= self.ends[index])
        window, positions = self.plan.windows[layer], store.filled.positions
        if window is not None and positions is not None:
            store.place_position(self.position)
            seen = seen & (positions > self.position - window)
        return finish(seen[:, None, None], self.plan.kind, hidden.dtype)

    def _fresh_positions(self, call: AttentionCall) -> Tensor:
        return self.position.expand(call.key.shape[0], 1)

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attention over the whole buffer."""
        if self.plan.kind == "sdpa" and decode.applies(call.query, call.given):
            call.base = decode.matmul_decode
        return call.run()


def check(plan: Plan) -> None:
    """Raise ``UnsupportedModelError`` for what cannot run in one graph."""
    if plan.rerank:
        raise UnsupportedModelError(
            "compile_decode and rankings anew while decoding (rerank_every, recall_every, dycoke) "
            "exclude each other: leave rerank_every and recall_every at None, or use another policy"
        )
    if plan.wiring.in_order:
        raise UnsupportedModelError(
            "compile_decode needs buffers of fixed size, and this model's indexes have none: leave "
            "compile_decode at None"
        )
    if plan.kind == "flash":
        raise UnsupportedModelError(
            "compile_decode needs masks over a whole buffer, which flash attention does not take: "
            "load the model with attn_implementation='sdpa'"
        )
