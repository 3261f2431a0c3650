"""Candidates of assisted decoding that stand behind a prompt in its own pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from st3.engine.calls import AttentionCall
from st3.engine.masks import as_bool, causal, finish
from st3.engine.plan import Plan
from st3.engine.prompt import Block
from st3.engine.ranker import DeferredScore
from st3.engine.select import rank_visual
from st3.errors import TrimStateError
from st3.methods.upload import upload


def candidates_mask(
    plan: Plan,
    layer: int,
    block: Block,
    score: Tensor | DeferredScore,
    budgets: Sequence[int],
    call: AttentionCall,
    tail: int,
) -> Tensor | None:
    """The mask of a prompt whose last columns are candidates, which see what their decode steps
    would see.

    Args:
        score: [1, N] or [1, KV heads, N], what the layer's cache is ordered by.
        budgets: the counts that shares are taken of, of the only row.
        tail: columns that are candidates.
    """
    if not isinstance(score, Tensor):
        raise TrimStateError("candidates of assisted decoding need a score that does not wait")
    columns, device = call.query.shape[2], call.query.device
    seen = causal(columns, columns, device) if call.mask is None else as_bool(call.mask)
    seen = seen.expand(call.query.shape[0], 1, columns, columns).clone()
    if score.dim() == 3:
        block, score = block.apart(score.shape[1]), score[0]
        seen = seen.repeat_interleave(call.query.shape[1], 1)
    rank = rank_visual(block, score)
    group = torch.zeros_like(rank) if block.group is None else block.group
    for place in range(tail):
        shown = [plan.schedule.visible(layer, n, place + 1) for n in budgets]
        gone = block.visual & (rank >= upload(shown, rank.device)[group])
        hidden = gone.repeat_interleave(seen.shape[1] // len(gone), 0)
        seen[:, :, columns - tail + place] &= ~hidden
    return finish(seen, plan.kind, call.query.dtype)
