"""Likeness to the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class Relevance:
    """Cosine of a visual token's embedding and the mean of those of the text behind the image.

    Source: the conditioning of CDPruner (arXiv 2506.10967) as OpenVINO GenAI computes it, without
    a text encoder beside the vision tower.
    """

    name: str = "relevance"
    stage: Stage = "embeds"

    def __call__(self, view: TokenView) -> Tensor:
        assert view.hidden is not None  # layer 0 always has embeddings
        unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
        question = view.question.to(unit.dtype)
        mean = (unit * question[..., None]).sum(1) / question.sum(1, keepdim=True).clamp_min(1)
        return (unit * mean[:, None]).sum(-1)
