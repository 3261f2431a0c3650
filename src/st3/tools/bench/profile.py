"""What torch.profiler says: waits for the device in decode steps, kernel time, st3's share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from st3.tools.bench.measure import generation, prefill
from st3.tools.bench.methods import Method
from st3.tools.bench.overhead import MODEL, PREFIX, RANGES, Ranges, observed
from st3.tools.bench.prompts import Prompt

# Calls in which the host waits for the device, or reads a value from it. (A copy to the host is
# followed by one of them.)
WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)


@dataclass(frozen=True)
class DecodeProfile:
    """Of one decode step.

    Attributes:
        waits: calls of each of :data:`WAITS` per step. What does not depend on the number of
            layers is generate()'s own: whether all rows are finished.
        launches: kernels per step; 0 on a CPU.
        busy: seconds in which kernels ran; 0 on a CPU.
    """

    waits: dict[str, float]
    launches: float
    busy: float


def profile_decode(
    model: Any, prompt: Prompt, method: Method, few: int = 4, many: int = 12
) -> DecodeProfile:
    """Two generations of different lengths: their difference holds decode steps alone."""
    if not 2 <= few < many:
        raise ValueError(f"two lengths of at least 2 tokens, the first smaller: got {few}, {many}")
    counted = []
    for tokens in (few, many):
        with method.attach(model, prompt):
            generation(model, prompt, 2)
            with _profiler(prompt) as profiler:
                generation(model, prompt, tokens)
        counted.append(_counted(profiler))
    (waits_a, launches_a, busy_a), (waits_b, launches_b, busy_b) = counted
    steps = many - few
    return DecodeProfile(
        {name: (waits_b[name] - waits_a[name]) / steps for name in WAITS},
        (launches_b - launches_a) / steps,
        (busy_b - busy_a) / steps,
    )


@dataclass(frozen=True)
class PrefillProfile:
    """Of one prefill.

    Attributes:
        waits: calls of each of :data:`WAITS`.
        launches: kernels; 0 on a CPU.
        busy: seconds in which kernels ran; 0 on a CPU.
        seconds: in all, without the profiler. Where it is far above ``busy``, the host is too slow
            to keep the device busy.
    """

    waits: dict[str, float]
    launches: int
    busy: float
    seconds: float


def profile_prefill(model: Any, prompt: Prompt, method: Method) -> PrefillProfile:
    """One prefill behind two that are not profiled, of which the second one is timed."""
    with method.attach(model, prompt):
        prefill(model, prompt)
        seconds = prefill(model, prompt)
        with _profiler(prompt) as profiler:
            prefill(model, prompt)
    return PrefillProfile(*_counted(profiler), seconds)


def selection_share(model: Any, prompt: Prompt, method: Method) -> float:
    """Share of a trimmed prefill's kernel time (on a CPU: of its time) that is st3's own work."""
    with method.attach(model, prompt), observed(model, Ranges()):
        prefill(model, prompt)
        with _profiler(prompt) as profiler:
            prefill(model, prompt)
    events = profiler.key_averages()
    cuda = prompt.device.type == "cuda"
    inside = {
        name: sum(
            e.device_time_total if cuda else e.cpu_time_total
            for e in events
            if e.key == PREFIX + name and e.device_type.name == "CPU"
        )
        for name in (*RANGES, MODEL)
    }
    # "score" and "model" lie within "choose", so that the score is in the sum already.
    own = sum(inside[name] for name in RANGES if name != "score") - inside[MODEL]
    if cuda:
        total = sum(e.self_device_time_total for e in events if _is_kernel(e))
    else:
        total = sum(e.self_cpu_time_total for e in events)
    return float(own / total)


def _counted(profiler: Any) -> tuple[dict[str, float], int, float]:
    """Calls of each of :data:`WAITS`, kernels, and the seconds in which they ran."""
    events = profiler.key_averages()
    kernels = [e for e in events if _is_kernel(e)]
    return (
        {name: sum(e.count for e in events if e.key == name) for name in WAITS},
        sum(e.count for e in kernels),
        sum(e.self_device_time_total for e in kernels) / 1e6,
    )


def _profiler(prompt: Prompt) -> Any:
    activities = [ProfilerActivity.CPU]
    if prompt.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    return profile(activities=activities, acc_events=True)


def _is_kernel(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA" and not event.is_user_annotation)
