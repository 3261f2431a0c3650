"""The largest batch that fits: predicted from bytes, then probed; and its tokens per second."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from st3.cost import TextDims, as_needed, kv_allocated_bytes, state_bytes, with_headroom
from st3.cost.kv import bytes_per_value
from st3.engine.kv.layout import capacity_for
from st3.engine.plan import lay_out
from st3.engine.wiring import Wiring
from st3.methods.schedule import Schedule
from st3.tools.bench import prompts
from st3.tools.bench.clock import Deadline, in_turn, median
from st3.tools.bench.measure import Generation, generation
from st3.tools.bench.methods import Method
from st3.tools.bench.models import Subject
from st3.tools.bench.suite import Workload
from st3.tools.common.memory import Peak, available_bytes


@dataclass
class Capacity:
    """What one method reaches at its largest batch. The vision tower is in none of the times."""

    label: str
    predicted: int
    largest: int
    generations: list[Generation] = field(default_factory=list)
    peak: int | None = None
    new_tokens: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        total = median([g.total for g in self.generations])
        return self.largest * self.new_tokens / total if total else None

    @property
    def tpot(self) -> float | None:
        steps = [step for g in self.generations for step in g.steps]
        return median(steps)


def measure_capacity(
    subject: Subject,
    workload: Workload,
    methods: Sequence[Method],
    memory: int | None = None,
    deadline: Deadline | None = None,
    limit: int = 4096,
) -> list[Capacity]:
    """Find each method's largest batch, then generate at these batches in turn.

    Args:
        workload: of which ``batch`` is replaced.
        memory: bytes to fill; None: what the device has free.
        limit: no batch above it is tried (on a CPU memory is no place to run out of).

    Raises:
        ValueError: the free memory of this device cannot be told, or not one row fits.
    """
    free = available_bytes(subject.device) if memory is None else memory
    if free is None:
        raise ValueError(f"the free memory of {subject.device} cannot be told: pass memory")
    found: dict[str, Capacity] = {}
    for method in methods:
        guess = max(1, int(free / row_bytes(subject, workload, method)))
        fits = _probe(subject, workload, method)
        largest = largest_batch(fits, min(guess, limit), limit, deadline)
        if largest < 1:
            raise ValueError(f"{method.label}: not one row fits")
        found[method.label] = Capacity(method.label, guess, largest, new_tokens=workload.new_tokens)
    calls = {
        method.label: _timed(subject, workload, method, found[method.label]) for method in methods
    }
    for label, samples in in_turn(calls, workload.repeats, deadline=deadline).items():
        found[label].generations = samples
    return list(found.values())


def largest_batch(
    fits: Callable[[int], bool],
    guess: int,
    limit: int = 4096,
    deadline: Deadline | None = None,
    precision: float = 0.03,
) -> int:
    """The largest batch for which ``fits`` is true, to ``precision``; 0 if not even 1 is.

    The guess is taken to be good: steps away from it begin small (1/8) and double. Behind the
    deadline the best batch so far stands.
    """
    low, high = 0, limit + 1  # low fits (or is 0), high does not (or is out of bounds)
    batch, step = max(1, min(guess, limit)), 0.125
    while high - low > 1 and (low == 0 or (high - low) > precision * low):
        if deadline is not None and deadline.left <= 0 and low:
            break
        if fits(batch):
            low = batch
            batch = min(limit, max(low + 1, int(low * (1 + step)))) if high > limit else 0
        else:
            high = batch
            batch = max(1, int(high * (1 - step))) if not low else 0
        step *= 2
        if not batch or not low < batch < high:
            batch = (low + high) // 2
    return low


def row_bytes(subject: Subject, workload: Workload, method: Method) -> int:
    """A row's bytes at the worst moment: some layer's activations and the KV cache written until
    then, in the prefill, or the whole cache at the end of the generation; and its states."""
    dims = TextDims.from_config(subject.model.config)
    wiring = Wiring(dims.sources, dims.in_order)
    schedule = None if method.policy is None else lay_out(method.policy, wiring)
    size = bytes_per_value(subject.dtype)
    text = subject.text_config
    wide = 8 * dims.hidden + 3 * getattr(text, "intermediate_size", 4 * dims.hidden)
    worst, stored = 0, 0
    for index, layer in enumerate(dims.layers):
        tokens = workload.text + _kept(schedule, index, workload.visual)
        stored += layer.held * tokens
        worst = max(worst, stored + tokens * wide)
    end = kv_allocated_bytes(
        dims,
        workload.text,
        workload.visual,
        schedule,
        max(0, workload.new_tokens - 1),
        subject.dtype,
        rule=as_needed if schedule is None else with_headroom(capacity_for),
    )
    return max(worst * size, end) + state_bytes(dims, subject.dtype)


def _kept(schedule: Schedule | None, layer: int, visual: int) -> int:
    return visual if schedule is None else schedule.kept(layer, visual)


def _prompt(subject: Subject, workload: Workload, batch: int) -> prompts.Prompt:
    rows = prompts.uniform(batch, workload.visual, workload.text, workload.images)
    return prompts.build(rows, subject.vocab, subject.device)


def _probe(subject: Subject, workload: Workload, method: Method) -> Callable[[int], bool]:
    def attempt(batch: int) -> bool:
        try:
            prompt = _prompt(subject, workload, batch)
            with method.attach(subject.model, prompt):
                generation(subject.model, prompt, workload.new_tokens)
        except torch.OutOfMemoryError:
            return False
        return True

    def fits(batch: int) -> bool:
        result = attempt(batch)
        _clear(subject.device)  # behind the call: its tensors are gone now
        return result

    return fits


def _timed(
    subject: Subject, workload: Workload, method: Method, found: Capacity
) -> Callable[[], Generation]:
    def call() -> Generation:
        _clear(subject.device)  # the other methods' blocks have other sizes
        prompt = _prompt(subject, workload, found.largest)
        with Peak(subject.device) as peak, method.attach(subject.model, prompt):
            result = generation(subject.model, prompt, workload.new_tokens)
        found.peak = peak.bytes
        return result

    return call


def _clear(device: Any) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
