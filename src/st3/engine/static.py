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

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.append import Behind
from st3.engine.cache import TrimmedLayer
from st3.engine.clock import Clock
from st3.engine.masks import finish
from st3.engine.plan import Attend, Plan
from st3.errors import UnsupportedModelError

_number = itertools.count()
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass
class StaticAppend(Behind):
    """A decode step of one token per row, without a decision of Python's that could change.

    Attributes:
        starts: [layers, B] int64 on the device, first live column of each row in its buffer.
        ends: [layers] int64 on the device, the new token's column.
        position: [] int64 on the device, the new token's logical position.
    """

    plan: Plan
    cache: list[TrimmedLayer]
    clock: Clock
    bucket: int
    starts: Tensor = field(init=False)
    ends: Tensor = field(init=False)
    position: Tensor = field(init=False)

    def __post_init__(self) -> None:
        first = self.cache[0].buffer
        rows, device = first.shape[0], first.device
        self.starts = torch.zeros(len(self.cache), rows, dtype=torch.long, device=device)
        self.ends = torch.zeros(len(self.cache), dtype=torch.long, device=device)
        self.position = torch.zeros((), dtype=torch.long, device=device)
        for tensor in (self.starts, self.ends, self.position):
            _fix_address(tensor)

    def prepare(self) -> None:
        """Fill in the step's tensors; give full buffers another bucket."""
        step = self.clock.step(self.clock.start)
        starts = []
        for layer in self.cache:
            rows = layer.row_starts(step)
            layer.fix_room(min(rows), self.bucket)
            starts.append([max(0, row - layer.base) for row in rows])
        # From ordinary memory, so that the copy is done before Python fills in the next step's.
        self.starts.copy_(torch.tensor(starts))
        self.ends.copy_(torch.tensor([layer.end - layer.base for layer in self.cache]))
        self.position.fill_(self.clock.start)
        for index, layer in enumerate(self.cache):
            layer.next_column = self.ends[index : index + 1]

    def done(self) -> None:
        """The compiled step has run."""
        for layer in self.cache:
            layer.next_column = None
            layer.end += 1
            layer.length = self.clock.start + 1

    def _mask(self, layer: int, hidden: Tensor) -> Tensor | None:
        """A mask over the whole of the layer's buffer."""
        past = self.cache[layer]
        column = torch.arange(past.buffer.shape[2], device=hidden.device)
        seen = (column >= self.starts[layer][:, None]) & (column <= self.ends[layer])
        window = self.plan.windows[layer]
        if window is not None:
            past.place_position(self.position)
            seen = seen & (past.stored_positions > self.position - window)
        return finish(seen[:, None, None], self.plan.kind, hidden.dtype)

    def attend(
        self, layer: int, base: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention over the whole buffer."""
        if self.plan.kind == "sdpa" and decode.applies(query, kwargs):
            base = decode.matmul_decode
        return base(module, query, key, value, mask, **kwargs)


def compile_text(forward: Callable[..., Any], options: str | dict[str, Any]) -> Callable[..., Any]:
    """The text model's forward, compiled for decode steps of one token.

    Args:
        options: a mode of torch.compile, or its keyword arguments.

    Raises:
        ValueError: for an unknown mode.
    """
    if isinstance(options, str):
        if options not in MODES:
            raise ValueError(f"unknown compile_decode={options!r}: use one of {', '.join(MODES)}")
        options = {"mode": options}

    def run(**kwargs: Any) -> Any:
        return forward(**kwargs)

    # torch counts graphs per code object and gives up at eight: each trimmer gets one of its own,
    # so that attaching again, or to another model, starts from zero.
    run.__code__ = run.__code__.replace(co_name=f"decode_step_{next(_number)}")
    compiled = torch.compile(run, dynamic=False, fullgraph=True, **options)

    def step(**kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        # Any 4D mask is passed through to the layers, which are then given their own.
        stand_in = kwargs["inputs_embeds"].new_zeros(1, 1, 1, 1)
        kwargs["attention_mask"] = (
            dict.fromkeys(mask, stand_in) if isinstance(mask, dict) else stand_in
        )
        return compiled(**kwargs)

    return step


def check(plan: Plan) -> None:
    """Raise ``UnsupportedModelError`` for what cannot run in one graph."""
    if plan.rerank:
        raise UnsupportedModelError(
            "compile_decode and rerank_every exclude each other: leave rerank_every at None"
        )
    if plan.kind == "flash":
        raise UnsupportedModelError(
            "compile_decode needs masks over a whole buffer, which flash attention does not take: "
            "load the model with attn_implementation='sdpa'"
        )


def _fix_address(tensor: Tensor) -> None:
    torch._dynamo.mark_static_address(tensor)  # CUDA graphs then read it in place
