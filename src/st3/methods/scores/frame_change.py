"""What is new in a video's frame: EVS's score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Shape, Stage, TokenView
from st3.methods.scores.grid import Grid, clips_of, of_tokens
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class FrameChange:
    """One minus the cosine of a token's embedding and that of the same place one frame before; the
    first frame comes before all others.

    Source: EVS (efficient video sampling), as in vLLM. Departure: the tokens of a first frame, and
    of an image, rank by an even grid (:class:`~st3.methods.scores.Grid`), which counts only where
    they cannot all stay.
    """

    name: str = "evs"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("grids",)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.hidden is not None  # layer 0 always has embeddings
        device = view.ordinal.device

        def back(shape: Shape) -> Tensor:
            """How many tokens before it the same place one frame before is; 0 in a first frame."""
            frames = shape[0] if len(shape) == 3 else 1
            places = math.prod(shape) // frames
            steps = torch.full((frames, places), float(places), device=device)
            steps[0] = 0.0
            return steps.flatten()

        steps = of_tokens(view, clips_of(view), back).long()
        before = column_of(view).gather(1, (view.ordinal - steps).clamp_min(0))
        unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
        earlier = unit.gather(1, before[..., None].expand_as(unit))
        return torch.where(steps > 0, 1 - (unit * earlier).sum(-1), 4 + Grid()(view))


def column_of(view: TokenView) -> Tensor:
    """Column of each visual token by its ordinal, [B, most visual tokens]; 0 for those of others,
    as long as none has been dropped."""
    most = max((sum(row) for row in view.images), default=0)
    place = torch.arange(view.visual.shape[1], device=view.visual.device).expand_as(view.visual)
    columns = place.new_zeros(place.shape[0], most + 1)
    columns.scatter_(1, torch.where(view.visual, view.ordinal, most), place)
    columns[:, most] = 0
    return columns
