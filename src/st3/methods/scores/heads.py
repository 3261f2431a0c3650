"""A score of attention, for each KV head by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from st3.methods.scores.base import LayerView, Score


def per_head(score: Score, view: LayerView) -> Tensor:
    """What ``score`` says where it is shown one KV head and the query heads that share it, of each
    KV head, [B, KV heads, N]."""
    of_rows: Any = score
    found: Tensor = of_rows(apart(view, getattr(score, "last_row", False)))
    return found.unflatten(0, (-1, view.key.shape[1]))


def apart(view: LayerView, last_row: bool = False) -> LayerView:
    """A view in which each KV head is a row of the batch.

    Args:
        last_row: whether of the queries the prompt's last token's alone are looked at.
    """
    heads = view.key.shape[1]

    def split(states: Tensor) -> Tensor:
        """[B, query or KV heads, ...] -> [B * KV heads, those of one KV head, ...]."""
        return states.unflatten(1, (heads, -1)).flatten(0, 1)

    def repeat(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows.repeat_interleave(heads, 0)

    def unrotate() -> tuple[Tensor, Tensor]:
        assert view.unrotate is not None  # the engine gives it to the scores that ask
        query, key = view.unrotate()
        return split(query), split(key)

    last = split(view.last_rows()) if last_row else None
    return replace(
        view,
        query=split(view.query) if last is None else last,
        key=split(view.key),
        last_query=last,
        hidden=repeat(view.hidden),
        visual=view.visual.repeat_interleave(heads, 0),
        ordinal=view.ordinal.repeat_interleave(heads, 0),
        last=view.last.repeat_interleave(heads, 0),
        valid=repeat(view.valid),
        group=repeat(view.group),
        key_valid=repeat(view.key_valid),
        prepared=repeat(view.prepared),
        images=tuple(row for row in view.images for _ in range(heads)),
        grids=tuple(row for row in view.grids for _ in range(heads)),
        unrotate=None if view.unrotate is None else unrotate,
        over_ranks=lambda score: score,  # a head belongs to one process
    )
