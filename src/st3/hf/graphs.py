"""Decode steps as CUDA graphs, recorded as they run: no compiler, ready after two steps.

A small batch's step is bound by the host, which launches a thousand kernels for it. A graph
launches them all at once. The first step of a cache runs as it is, the second is recorded, and
the others replay it; so too behind a step for which a buffer of the cache has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from st3.engine.compiled import CompiledStep
from st3.engine.session import Session
from st3.errors import UnsupportedModelError
from st3.hf.call import CACHE, cache_in, compiled_arguments, hidden_of

MODE = "graphs"


class Graph(Protocol):
    """Work that was recorded once; ``hidden`` is what it gave. A replay fills that anew."""

    hidden: Tensor

    def replay(self) -> None: ...


class CudaGraph:
    """Work on a CUDA device, recorded without being done."""

    def __init__(self, work: Callable[[], Tensor], device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedModelError(
                f"compile_decode='graphs' records CUDA graphs, and the model is on {device.type}: "
                "leave compile_decode at None"
            )
        self._graph = torch.cuda.CUDAGraph()
        stream, current = _stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Other threads may go on using the device meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.hidden = work()
            finally:
                self._graph.capture_end()
        current.wait_stream(stream)

    def replay(self) -> None:
        self._graph.replay()


@cache  # libraries keep tens of MiB for each stream that they are used on
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device that graphs are recorded on."""
    return torch.cuda.Stream(device)


class RecordedSteps:
    """A text model's ``forward`` for decode steps. Holds no cache between them.

    Args:
        record: makes a graph of work on a device.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        record: Callable[[Callable[[], Tensor], torch.device], Graph] = CudaGraph,
    ) -> None:
        self.forward, self.record = forward, record
        self._graph: Graph | None = None
        self._tensors: dict[str, Tensor] = {}  # the recorded step's arguments
        self._kind: type[Any] | None = None  # of the output; None for one that cannot be made anew
        self._key: Any = None  # of the step before

    def __call__(self, step: CompiledStep, kwargs: dict[str, Any]) -> Any:
        """The output of one step, whose hidden states are the caller's own."""
        given = compiled_arguments(kwargs, step.position)
        key = step.places, _alike(given), torch.is_inference_mode_enabled()
        if key != self._key or self._kind is None:
            # As it is: libraries make some things at the first time, which cannot be recorded.
            output = self.forward(**given)
            self._graph, self._key, self._kind = None, key, _kind_of(output)
            return output
        if self._graph is None:
            self._tensors = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
            own = given | self._tensors
            device = kwargs["inputs_embeds"].device
            self._graph = self.record(lambda: hidden_of(self.forward(**own)), device)
        else:
            for name, held in self._tensors.items():
                held.copy_(given[name])
        self._graph.replay()
        return self._kind(last_hidden_state=self._graph.hidden.clone(), **{CACHE: cache_in(kwargs)})


def recorded_forward(forward: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """A text model's ``forward``: decode steps as CUDA graphs, everything else as it is.

    Raises:
        UnsupportedModelError: for decoders with states, which are replaced at each step.
    """
    if session.plan.wiring.has_states:
        raise UnsupportedModelError(
            "compile_decode='graphs' needs a cache that stays in its place, and this model's "
            "states do not: use compile_decode='default'"
        )
    steps = RecordedSteps(forward)

    def step_or_pass(*args: Any, **kwargs: Any) -> Any:
        step = session.current
        if not isinstance(step, CompiledStep):
            return forward(*args, **kwargs)
        output = steps(step, kwargs)
        step.done()
        return output

    return step_or_pass


def _kind_of(output: Any) -> type[Any] | None:
    """The class of an output of hidden states and a cache alone; None for any other."""
    names = set(output.keys()) if isinstance(output, ModelOutput) else {""}
    return type(output) if names <= {"last_hidden_state", CACHE} else None


def _alike(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same for a recorded step to hold: shapes of tensors, and plain values."""
    return tuple(
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, _plain(value))
        for name, value in given.items()
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)
