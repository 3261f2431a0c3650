"""Where st3's own part of a trimmed prefill goes: runs apart from the timed ones, with timers
around the engine's entry points."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.autograd.profiler import record_function

from st3.engine.cache import TrimmedLayer
from st3.engine.columns import Memo, memoised
from st3.engine.director import Director
from st3.engine.prefill import Prefill
from st3.tools.bench.measure import generation, prefill
from st3.tools.bench.methods import Method
from st3.tools.bench.prompts import Prompt

RANGES = ("begin", "gather", "score", "choose", "finish")
MODEL = "model"
PREFIX = "st3."

Function = Callable[..., Any]


@dataclass(frozen=True)
class Overhead:
    """Seconds of one trimmed prefill spent in st3's own work, by range, and in all."""

    ranges: dict[str, float]
    prefill: float

    @property
    def seconds(self) -> float:
        return sum(self.ranges.values())

    @property
    def share(self) -> float:
        """Of the trimmed prefill, 0..1."""
        return self.seconds / self.prefill


def selection_overhead(
    model: Any, prompt: Prompt, method: Method, runs: int = 5
) -> Overhead | None:
    """Medians over ``runs`` prefills behind an unmeasured one, all on a model that stays attached,
    as in a server. None where st3's engine is not used, and on CUDA, where
    :func:`st3.tools.bench.profile.selection_share` asks the profiler."""
    if not method.own_engine or prompt.device.type != "cpu":
        return None
    watch = Stopwatch()
    samples: list[dict[str, float]] = []
    totals: list[float] = []
    with probed(watch.wrap), method.attach(model, prompt):
        for _ in range(runs + 1):
            watch.seconds = {}
            totals.append(prefill(model, prompt))
            samples.append(watch.seconds)
    ranges = {
        name: statistics.median(sample.get(name, 0.0) for sample in samples[1:]) for name in RANGES
    }
    return Overhead(ranges, statistics.median(totals[1:]))


def copying_share(model: Any, prompt: Prompt, method: Method, new_tokens: int) -> float:
    """Share of a generation's decode steps, 0..1, spent in copying full buffers to new ones, which
    is also how annealed entries are given back. On a CPU: elsewhere copies are queued."""
    watch = Stopwatch()
    move = watch.wrap(TrimmedLayer._move, "copy")
    with _exchanged([(TrimmedLayer, "_move", move)]), method.attach(model, prompt):
        steps = generation(model, prompt, new_tokens).steps
    return watch.seconds.get("copy", 0.0) / sum(steps)


class Stopwatch:
    """Time spent in named functions; one called within another is taken off the outer one.

    Attributes:
        seconds: by name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # what functions called by the one under way have taken

    def wrap(self, function: Function, name: str) -> Function:
        """The same function, its time noted under ``name``. Written for least cost: what the timers
        take is in the figures, too."""
        clock = time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self._inner = self._inner, 0.0
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent = clock() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
                self._inner = before + spent

        return timed


def as_range(function: Function, name: str) -> Function:
    """The same function, in the range ``st3.<name>`` of torch.profiler."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + name):
            return function(*args, **kwargs)

    return inside


@contextmanager
def probed(wrap: Callable[[Function, str], Function]) -> Iterator[None]:
    """Wrap the engine's entry points by name: *begin* (read the batch), *gather* (shrink a layer's
    inputs), *score*, *choose* (who stays), *finish* (file keys and values, restore the output's
    shape). What the model itself computes inside of them is *model*.

    Enter it before a trimmer is attached. st3's own classes are wrapped, while in the block."""
    attend = wrap(Prefill.attend, "choose")
    watched: Memo = {}  # made once: a plan looks things up when first asked
    bases: Memo = {}

    def wrapped_attend(
        self: Prefill, layer: int, base: Any, module: Any, *args: Any, **kwargs: Any
    ) -> Any:
        plan = self.plan
        other: Any = memoised(
            watched, plan, lambda: dataclasses.replace(plan, score=_Watched(plan.score, wrap))
        )
        self.plan = other
        model: Any = memoised(bases, base, lambda: wrap(base, MODEL))
        try:
            return attend(self, layer, model, module, *args, **kwargs)
        finally:
            self.plan = plan

    wrapped = [
        (Director, "on_text", wrap(Director.on_text, "begin")),
        (Prefill, "enter", wrap(Prefill.enter, "gather")),
        (Prefill, "attend", wrapped_attend),
        (Director, "after_text", wrap(Director.after_text, "finish")),
    ]
    with _exchanged(wrapped):
        yield


class _Watched:
    """A score, wrapped; all that is asked of it is asked of the score."""

    def __init__(self, score: Any, wrap: Callable[[Function, str], Function]) -> None:
        self._score = score
        self._call = wrap(score, "score")

    def __call__(self, view: Any) -> Any:
        return self._call(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._score, name)


@contextmanager
def _exchanged(methods: Sequence[tuple[type, str, Any]]) -> Iterator[None]:
    """Give classes other methods while in the block."""
    originals = [(cls, name, getattr(cls, name)) for cls, name, _ in methods]
    try:
        for cls, name, function in methods:
            setattr(cls, name, function)
        yield
    finally:
        for cls, name, function in originals:
            setattr(cls, name, function)
