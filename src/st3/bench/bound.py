"""The time that a decode step cannot do without: weights, and the live KV cache at memory speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from st3.bench.clock import Marks
from st3.bench.measure import generation
from st3.bench.prompts import Row, build

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


def weights_only_step(model: Any, batch: int, new_tokens: int = 16) -> float:
    """Median seconds of a decode step of the untouched model behind a prompt of one text token:
    next to no KV cache, all the weights."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    prompt = build([Row(1, ())] * batch, vocab, model.device)
    return statistics.median(generation(model, prompt, max(3, new_tokens)).steps)


def over_bound(
    steps: Sequence[float], kv_live: Sequence[int], weights: float, bandwidth: float
) -> float | None:
    """Median over decode steps of time / (weights-only time + live KV bytes / bandwidth).

    Args:
        steps: seconds of decode steps 1, 2, ...
        kv_live: bytes after the prefill and after each decode step; step ``t`` reads what is live
            after it.
    """
    if not steps:
        return None
    if len(kv_live) != len(steps) + 1:
        raise ValueError(f"{len(steps)} decode steps need {len(steps) + 1} KV sizes")
    return statistics.median(
        step / (weights + live / bandwidth) for step, live in zip(steps, kv_live[1:], strict=True)
    )
