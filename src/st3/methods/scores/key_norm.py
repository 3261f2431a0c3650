"""Norm of a token's keys, a score that needs no query."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from st3.methods.scores.base import LayerView
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class KeyNorm:
    """L2 norm of the keys, mean over the KV heads: the SMALLER the norm, the longer it is kept.

    Source: arXiv 2406.11430, which finds that keys of a low norm draw high attention; ViTCoP (arXiv
    2601.17818) ranks visual tokens by it inside of the decoder. RoPE does not change a norm.
    """

    name: str = "key_norm"

    def __call__(self, view: LayerView) -> Tensor:
        norms = view.key[:, :, view.first_column :].float().norm(dim=-1)
        return -norms.mean(dim=1)
