"""The time that a decode step cannot do without: weights, and the live KV cache at memory speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from st3.tools.bench.measure import Footprint
from st3.tools.common.clock import Marks

_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}


@torch.no_grad()
def read_bandwidth(device: torch.device, runs: int = 25) -> float:
    """Bytes per second at which ``device`` reads memory, with torch's current threads: the better
    of a sum and of a matrix-vector product over a buffer that no cache holds, best of ``runs``."""
    size = _BYTES.get(device.type, 1 << 28)
    matrix = torch.ones(size // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    kernels: tuple[Callable[[], Any], ...] = (matrix.sum, lambda: torch.mv(matrix, vector))
    best = min(_fastest(kernel, device, runs) for kernel in kernels)
    return size / best


def _fastest(kernel: Callable[[], Any], device: torch.device, runs: int) -> float:
    times = []
    for _ in range(runs + 1):
        marks = Marks(device)
        marks.mark()
        kernel()
        marks.mark()
        times.append(marks.seconds()[0])
    return min(times[1:])


def over_bound(held: Footprint, bandwidth: float) -> float | None:
    """Median over decode steps of time / (weights-only time + live KV bytes / bandwidth). Step
    ``t`` reads what is live after it. None without steps."""
    if not held.steps:
        return None
    triples = zip(held.steps, held.weights, held.kv_live[1:], strict=True)
    return statistics.median(step / (weights + live / bandwidth) for step, weights, live in triples)
