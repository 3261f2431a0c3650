"""Where st3's own part of a trimmed prefill goes: runs apart from the timed ones, with an observer
that times the engine's spans."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch.autograd.profiler import record_function

from st3.engine.events import Observer
from st3.tools.bench.measure import generation, prefill
from st3.tools.bench.methods import Method
from st3.tools.bench.prompts import Prompt
from st3.trimmer import trimmer_of

# *begin* (read the batch), *gather* (shrink a layer's inputs), *score*, *choose* (who stays),
# *finish* (hand keys and values to the cache, restore the output's shape). What the model itself
# computes inside of them is *model*.
RANGES = ("begin", "gather", "score", "choose", "finish")
MODEL = "model"
PREFIX = "st3."


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
    with method.attach(model, prompt), observed(model, watch):
        for _ in range(runs + 1):
            watch.seconds = {}
            totals.append(prefill(model, prompt))
            samples.append(watch.seconds)
    ranges = {
        name: statistics.median(sample.get(name, 0.0) for sample in samples[1:]) for name in RANGES
    }
    return Overhead(ranges, statistics.median(totals[1:]))


def copying_share(model: Any, prompt: Prompt, method: Method, new_tokens: int) -> float:
    """Share of a generation's decode steps, 0..1, spent in making room, which copies full buffers
    to new ones: that is also how annealed entries are freed. On a CPU: elsewhere copies are
    queued."""
    watch = Stopwatch()
    with method.attach(model, prompt), observed(model, watch):
        steps = generation(model, prompt, new_tokens).steps
    return watch.seconds.get("grow", 0.0) / sum(steps)


@contextmanager
def observed(model: Any, observer: Observer) -> Iterator[None]:
    """Let ``observer`` look at the passes of the trimmer on ``model``, if there is one."""
    trimmer = trimmer_of(model)
    with trimmer.observe(observer) if trimmer is not None else nullcontext():
        yield


class Stopwatch(Observer):
    """Time spent in the engine's spans; one inside of another is taken off the outer one.

    Attributes:
        seconds: by name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # what spans inside of the one under way have taken

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        before, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
            self._inner = before + spent


class Ranges(Observer):
    """Puts each span into a range ``st3.<name>`` of torch.profiler."""

    def span(self, name: str) -> record_function:
        return record_function(PREFIX + name)
