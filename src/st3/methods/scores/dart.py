"""Little duplication of a few pivot tokens: DART's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView, ranks
from st3.methods.scores.registry import register
from st3.methods.scores.uniform import even_spread


@register
@dataclass(frozen=True)
class Dart:
    """Keep the pivots, and for each pivot the visual tokens least similar to it.

    Pivots are the visual tokens, and the text tokens behind the image, whose keys have the largest
    L1 norm. Similarity is the cosine of hidden states. Every pivot ranks the other visual tokens
    from the least similar on; a token counts by its best place in these rankings.

    Args:
        image_pivots, text_pivots: how many of each.

    Source: DART (arXiv 2502.11494) and its code. Departures: pivots take turns, one token each, so
    that the order holds for any budget (the code lets one pivot after the other fill its share);
    similarity is taken before the decoder's final norm, not after it; at the input of layer 0,
    where there are no keys yet and annealing may ask, tokens rank by an even spread.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    name: str = "dart"
    stage: Stage = "input"
    needs: tuple[str, ...] = ("keys",)

    def __call__(self, view: TokenView) -> Tensor:
        if view.keys is None or view.hidden is None:
            return even_spread(view.ordinal)
        size = view.keys.float().abs().sum(dim=(1, 3))  # L1 norm over all heads, [B, N]
        pivots, real = [], []
        for among, count in ((view.visual, self.image_pivots), (view.question, self.text_pivots)):
            largest = size.masked_fill(~among, -1.0).topk(min(count, size.shape[1]), dim=1)
            pivots.append(largest.indices)
            real.append(largest.values >= 0)
        pivot, exists = torch.cat(pivots, dim=1), torch.cat(real, dim=1)
        unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
        chosen = unit.gather(1, pivot[..., None].expand(-1, -1, unit.shape[-1]))
        similarity = torch.matmul(chosen, unit.transpose(1, 2))  # [B, P, N]
        is_pivot = torch.zeros_like(size).scatter_add_(1, pivot, exists.to(size.dtype)) > 0
        others = view.visual & ~is_pivot
        places = torch.stack([ranks(-row, others) for row in similarity.unbind(1)], dim=1)
        places = places.masked_fill(~exists[..., None], places.shape[-1])
        best = places.amin(1)
        # Of tokens at the same place, the less similar one first.
        least = similarity.masked_fill(places > best[:, None], float("inf")).amin(1)
        by_similarity = ranks(-least, others)
        score = -ranks(-(best * places.shape[-1] + by_similarity), others).float() - 1.0
        return torch.where(is_pivot, size, score)
