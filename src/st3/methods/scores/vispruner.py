"""Tokens that the vision tower looks at, and of the others those that are not much like another:
VisPruner's score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Stage, TokenView, ranks, share_of
from st3.methods.scores.picks import interleaved
from st3.methods.scores.registry import register

AT_ONCE = 8  # tokens that a round of matching drops, at most


@register
@dataclass(frozen=True)
class Distinct:
    """A part of the kept tokens by the vision tower's attention; the others are what is left when
    duplicates have gone, round by round: of two halves of the rest, taken in turn by attention,
    those of the first half that are most like one of the second leave.

    Where it is not known how many tokens stay (``keep`` is None), a token counts by the better of
    two places: by attention, and by how late it would leave.

    Args:
        important: the share of the kept tokens that attention chooses.
        keep: share of the visual tokens that the drop leaves.

    Source: VisPruner (arXiv 2412.01818) and its code. Departures: likeness is that of the
    embeddings at the decoder's input, where the code takes the tower's features; where the tower
    has no class token, a token's attention is what it receives.
    """

    important: float = 0.5
    keep: float | None = None
    name: str = "vispruner"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("tower",)

    def __post_init__(self) -> None:
        check_share("important", self.important)
        if self.keep is not None:
            check_share("keep", self.keep)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.tower is not None  # the engine gives it or refuses
        assert view.hidden is not None
        unit = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
        score = torch.zeros_like(view.tower)
        for tokens, counts in view.budgets():
            place = ranks(view.tower, tokens).float()
            kept = None if self.keep is None else share_of(self.keep, counts)[:, 0].tolist()
            for row, here in enumerate(tokens):
                order = here.nonzero().flatten()
                order = order[place[row, order].argsort()]
                if not len(order):
                    continue
                if kept is None:
                    late = torch.zeros_like(place[row])
                    late[_by_survival(unit[row], order, 1)] = torch.arange(
                        len(order), device=late.device, dtype=late.dtype
                    )
                    own = interleaved(place[row], self.important, late)
                else:
                    first = int(kept[row] * self.important)
                    rest = _by_survival(unit[row], order[first:], kept[row] - first)
                    turn = torch.cat([order[:first], rest])
                    own = torch.zeros_like(place[row])
                    own[turn] = -torch.arange(len(turn), device=own.device, dtype=own.dtype)
                score[row] = torch.where(here, own, score[row])
        return score


def _by_survival(unit: Tensor, order: Tensor, left: int) -> Tensor:
    """``order``, the tokens by attention, with those first that stay when duplicates leave until
    ``left`` are there, then the others, the last to leave first."""
    gone: list[Tensor] = []
    while (drop := min(AT_ONCE, len(order) - left, (len(order) + 1) // 2)) > 0 and len(order) > 1:
        first, second = order[::2], order[1::2]
        alike = (unit[first] @ unit[second].T).amax(1).argsort(descending=True, stable=True)
        gone.append(first[alike[:drop]])
        order = torch.cat([first[alike[drop:]], second])
    return torch.cat([order, *(part.flip(0) for part in reversed(gone))])
