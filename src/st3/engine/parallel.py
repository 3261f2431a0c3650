"""Models that are larger than one device: heads split over ranks, layers spread over devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


def head_group(attention: nn.Module) -> Any:
    """The process group over which transformers' tensor parallel plan has split an attention
    module's heads, or None if this process has them all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    for parameter in attention.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            names = mesh.mesh_dim_names
            if names is None and mesh.ndim == 1:
                return mesh.get_group()
            # FSDP alone splits weights, not heads: its ranks have prompts of their own.
            return mesh.get_group("tp") if names and "tp" in names else None
    return None


def mean_over_ranks(score: Tensor, group: Any) -> Tensor:
    """A score [B, N] of this rank's heads, averaged over the ranks that hold the others.

    All ranks must keep the same tokens. A mean over heads becomes exactly what one process with
    all heads has, up to rounding; scores that are no such mean are averaged all the same. Gathered,
    not all-reduced: every rank adds in the same order, so that no rounding tells them apart.
    """
    if group is None:
        return score
    score = score.contiguous()
    parts = [torch.empty_like(score) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, score, group=group)
    return torch.stack(parts).mean(dim=0)
