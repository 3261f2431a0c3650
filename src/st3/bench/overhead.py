"""Where st3's own part of a trimmed prefill goes: runs apart from the timed ones, with timers
around the engine's entry points."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch.autograd.profiler import record_function

from st3.bench.measure import generation, prefill
from st3.bench.methods import Method
from st3.bench.prompts import Prompt
from st3.engine.cache import TrimmedLayer
from st3.engine.columns import Memo, memoised
from st3.engine.director import Director
from st3.engine.prefill import Prefill

RANGES = ("begin", "gather", "score", "choose", "finish")
MODEL = "model"
PREFIX = "st3."

Range = Callable[[str], AbstractContextManager[Any]]


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
    :func:`st3.bench.profile.selection_share` asks the profiler."""
    if not method.own_engine or prompt.device.type != "cpu":
        return None
    watch = Stopwatch()
    samples: list[dict[str, float]] = []
    totals: list[float] = []
    with probed(watch.range), method.attach(model, prompt):
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
    move = _wrap(TrimmedLayer._move, watch.range, "copy")
    with _exchanged([(TrimmedLayer, "_move", move)]), method.attach(model, prompt):
        steps = generation(model, prompt, new_tokens).steps
    return watch.seconds.get("copy", 0.0) / sum(steps)


class _Range:
    """Cheaper than a generator: what timers cost is in the ranges, too."""

    __slots__ = ("before", "name", "since", "watch")

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.before, self.watch.inner = self.watch.inner, 0.0
        self.since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = time.perf_counter() - self.since
        watch, name = self.watch, self.name
        watch.seconds[name] = watch.seconds.get(name, 0.0) + spent - watch.inner
        watch.inner = self.before + spent


class Stopwatch:
    """Time spent in named ranges; a range within another is taken off the outer one.

    Attributes:
        seconds: by name.
        inner: what ranges within the open one have taken.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = 0.0

    def range(self, name: str) -> _Range:
        """A context whose time goes to ``name``."""
        return _Range(self, name)


def record_range(name: str) -> AbstractContextManager[Any]:
    """The same ranges for torch.profiler, under ``st3.<name>``."""
    return record_function(PREFIX + name)


@contextmanager
def probed(range_: Range) -> Iterator[None]:
    """Put ranges around the engine's entry points: *begin* (read the batch), *gather* (shrink a
    layer's inputs), *score*, *choose* (who stays), *finish* (file keys and values, restore the
    output's shape). What the model itself computes inside of them is in the range *model*.

    Enter it before a trimmer is attached. st3's own classes are wrapped, while in the block."""
    attend = Prefill.attend
    watched: Memo = {}  # made once: a plan looks things up when first asked
    bases: Memo = {}

    def timed_attend(
        self: Prefill, layer: int, base: Any, module: Any, *args: Any, **kwargs: Any
    ) -> Any:
        plan = self.plan
        other: Any = memoised(
            watched, plan, lambda: dataclasses.replace(plan, score=_Watched(plan.score, range_))
        )
        self.plan = other
        model: Any = memoised(bases, base, lambda: _wrap(base, range_, MODEL))
        try:
            with range_("choose"):
                return attend(self, layer, model, module, *args, **kwargs)
        finally:
            self.plan = plan

    wrapped = [
        (Director, "on_text", _wrap(Director.on_text, range_, "begin")),
        (Prefill, "enter", _wrap(Prefill.enter, range_, "gather")),
        (Prefill, "attend", timed_attend),
        (Director, "after_text", _wrap(Director.after_text, range_, "finish")),
    ]
    with _exchanged(wrapped):
        yield


class _Watched:
    """A score in the range *score*; all that is asked of it is asked of the score."""

    def __init__(self, score: Any, range_: Range) -> None:
        self._score = score
        self._range = range_

    def __call__(self, view: Any) -> Any:
        with self._range("score"):
            return self._score(view)

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


def _wrap(function: Any, range_: Range, name: str) -> Any:
    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with range_(name):
            return function(*args, **kwargs)

    return inside
