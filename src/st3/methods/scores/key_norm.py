"""Norm of a token's key, a score that needs no query."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from st3.methods.scores.base import LayerView
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class KeyNorm:
    """L2 norm of the mean of a token's keys over the KV heads: the SMALLER the norm, the longer it
    is kept.

    Source: the saliency of ViTCoP (arXiv 2601.17818) inside of the decoder, as in its code; that
    keys of a low norm draw high attention is the finding of arXiv 2406.11430, which ranks each head
    by itself. RoPE turns the keys of all heads alike, so that it does not change this norm.
    """

    name: str = "key_norm"

    def __call__(self, view: LayerView) -> Tensor:
        mean = view.key[:, :, view.first_column :].float().mean(dim=1)
        # The mean over all heads, where processes share them: a norm of means is no mean of norms.
        return -view.over_ranks(mean).norm(dim=-1)
