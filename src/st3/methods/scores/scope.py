"""Salient tokens that cover the others: SCOPE's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.picks import Picks, similarity, strangers
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class Scope:
    """Saliency and coverage: each token picked adds most to how well all visual tokens are covered
    by the ones picked, the gain counted times the attention that it draws in the vision tower (its
    class token's, or all of its tokens', where it has none).

    A token covers another by their cosine, and a token is covered as well as the best of those
    picked covers it. With each pick the host waits for the device.

    Args:
        alpha: power to which the attention is raised.

    Source: SCOPE, as in its code in Tencent/AngelSlim: the class token's attention where there is
    one, else what a token receives; in a layer that the code is told, here the one behind the
    features.
    """

    alpha: float = 1.0
    name: str = "scope"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("tower",)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.tower is not None  # the engine gives it or refuses
        saliency = view.tower.float() ** self.alpha
        covers = similarity(view).masked_fill_(strangers(view), 0.0)
        order = Picks(view)
        covered = torch.zeros_like(saliency)
        gain = covers.clamp_min(0.0).sum(1)
        for _ in range(order.turns):
            token = order.take(saliency * gain)
            better = torch.maximum(covered, covers[order.row, token])
            # What other tokens would add changes only where this one covers better: ever less.
            grown = (better > covered).any(0).nonzero().flatten()
            gain = gain - _missing(covers, covered, grown) + _missing(covers, better, grown)
            covered = better
        return order.scores(saliency)


def _missing(covers: Tensor, covered: Tensor, columns: Tensor) -> Tensor:
    """How much better each token would cover the ``columns`` than they are ``covered``, [B, N]."""
    return (covers[:, columns] - covered[:, columns, None]).clamp_min_(0.0).sum(1)
