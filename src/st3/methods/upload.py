"""Counts that Python knows, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``. The host does not wait for a GPU: a copy from ordinary
    memory waits until all queued kernels are done, one from pinned memory joins the queue."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)
