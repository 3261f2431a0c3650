"""Marks in time: the one stopwatch of the tools, right on devices that work behind the host."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Marks:
    """Points in time on a device.

    On CUDA they are events: nothing waits until :meth:`seconds`. Other accelerators (mps, xpu, npu)
    are waited for at each mark: without that, a mark would tell when the work was put in the queue.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


class MarkSteps(LogitsProcessor):
    """Marks each new token: generate() calls it right behind every forward pass."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.mark()
        return scores
