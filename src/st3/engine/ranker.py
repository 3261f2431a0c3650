"""The scores of one prefill: of what, when, and what is carried between layers for them.

A ranker is shown the input and the attention of each layer and gives scores back. It knows nothing
of the pass that shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from st3.engine.parallel import mean_over_ranks
from st3.engine.plan import Plan
from st3.engine.prompt import Block, Rows
from st3.methods.scores import LayerView, Score, TokenView
from st3.methods.scores.base import last_rows
from st3.methods.scores.heads import per_head


@dataclass
class DeferredScore:
    """A layer's score that nobody needs before its prompt is written to the cache.

    Attributes:
        row: [B, query heads, 1, head size], the query of the prompt's last token: with the keys,
            which the cache holds, all that such a score reads.
        given: the attention call's ``scaling`` and ``softcap``.
        facts: what the view says of the layer's columns.
        heads: whether it is wanted of each KV head.
    """

    score: Score
    row: Tensor
    given: dict[str, Any]
    facts: dict[str, Any]
    heads: bool = False

    def compute(self, key: Tensor) -> Tensor:
        """[B, N], or [B, KV heads, N], of the layer's keys [B, KV heads, N, head size]."""
        view = LayerView.of(self.row, key, self.given, last_query=self.row, **self.facts)
        if self.heads:
            return per_head(self.score, view)
        return cast(Any, self.score)(view)


class Ranker:
    """The scores of one prefill.

    Args:
        rows: the batch.
        orders: for each layer whether its cache wants an order of the visual tokens.
        tower: [looks, B, T], what the vision tower attends to; None unless the score asks.

    Attributes:
        scores: what each layer orders its cache by, and the layer behind it drops by: [B, N] of
            the layer's columns.
        head_scores: what each layer orders its cache by instead, where heads differ:
            [B, KV heads, N].
    """

    def __init__(self, plan: Plan, rows: Rows, orders: tuple[bool, ...], tower: Tensor | None):
        self.plan = plan
        self.rows = rows
        self.tower = tower
        self.scores: dict[int, Tensor | DeferredScore] = {}
        self.head_scores: dict[int, Tensor] = {}
        self._carried: Tensor | None = None  # of the present columns, for later layers
        self._prepared: Tensor | None = None
        self._noted: Tensor | None = None  # of the layer before
        self._turned: Tensor | None = None  # sums over the layers so far
        self._keys: Tensor | None = None  # of the layer before
        self._released = False
        self._hidden: Tensor | None = None  # the input of the layer under way, or of the one before
        self._tables: Any = None
        self._orders = orders
        self._wants = tuple(a or b for a, b in zip(plan.drops_behind, orders, strict=True))

    def reads_input(self, layer: int) -> bool:
        """Whether :meth:`observe_input` is to be called for ``layer``."""
        plan = self.plan
        later = plan.stage == "input" and (plan.prunes[layer] or self._orders[layer])
        return later or (layer == 0 and (plan.prepare is not None or plan.stage == "embeds"))

    @torch.no_grad()
    def observe_input(self, layer: int, block: Block, hidden: Tensor) -> None:
        """See what enters ``layer``, before tokens are dropped there: [B, N, hidden size]."""
        plan, hidden = self.plan, _one_stream(hidden)
        if layer == 0 and plan.prepare is not None:
            self._prepared = plan.prepare(self._token_view(layer, block, hidden))
        if plan.stage != "attention":
            score = cast(Any, plan.score)(self._token_view(layer, block, hidden))
            self._carried = mean_over_ranks(score, plan.ranks)

    def entered(self, hidden: Tensor, tables: Any) -> None:
        """What a layer is given, after tokens were dropped: hidden states and position tables."""
        self._hidden, self._tables = _one_stream(hidden), tables

    def observe(
        self,
        layer: int,
        block: Block,
        query: Tensor,
        key: Tensor,
        key_valid: Tensor | None,
        given: Mapping[str, Any],
        may_defer: bool,
    ) -> None:
        """See the attention of ``layer``: note its score, if somebody wants it.

        Args:
            query, key: after RoPE, [B, heads, N, head size], [B, KV heads, K >= N, head size].
            key_valid: [B, K] bool; None when all are.
            given: the attention function's keyword arguments.
            may_defer: whether the cache keeps ``key`` until the prompt is written.
        """
        plan = self.plan
        if "keys" in plan.needs:
            self._keys = key[:, :, key.shape[2] - query.shape[2] :].detach()
        if layer in self.scores:  # gradient checkpointing runs it again
            return
        wanted = any(self._orders) or plan.drops_behind[layer]
        if plan.note is not None and wanted and not self._released:
            with torch.no_grad():
                view = self._layer_view(layer, block, query, key, key_valid, given)
                self._noted = mean_over_ranks(plan.note(view), plan.ranks)
        users = plan.users.get(layer) if plan.by_attention is not None else None
        if users is None:  # an earlier layer's score, or one of the input
            if self._wants[layer] and self._carried is not None:
                self.scores[layer] = self._carried.to(query.device)
            return
        if not any(self._wants[user] for user in users):
            return
        if may_defer and plan.deferrable[layer]:
            self.scores[layer] = self._deferred(layer, block, query, given)
            return
        with torch.no_grad():
            view = self._layer_view(layer, block, query, key, key_valid, given)
            score = mean_over_ranks(cast(Any, plan.by_attention)(view), plan.ranks)
            if plan.per_head and self._orders[layer]:
                self.head_scores[layer] = per_head(cast(Score, plan.by_attention), view)
        self.scores[layer] = score
        if len(users) > 1:
            self._carried = score

    @torch.no_grad()
    def observe_part(self, layer: int, block: Block, given: Tensor, made: Tensor) -> None:
        """See what goes into the attention or the MLP of ``layer`` and what comes out of it, before
        it is added to the stream: [B, N, hidden size]."""
        if self.plan.turn is None or self._released:  # gradient checkpointing runs it again
            return
        turned = self.plan.turn(given, made, block.visual.to(given.device))
        self._turned = turned if self._turned is None else self._turned.to(turned.device) + turned

    def for_drop(self, layer: int) -> Tensor | None:
        """The score by which tokens are dropped before ``layer``; None if it was not taken."""
        plan = self.plan
        if plan.by_attention is None or layer == 0 or plan.wiring.states[layer - 1]:
            return self._carried
        score = self.scores.get(layer - 1)
        return score if isinstance(score, Tensor) else None

    def for_cache(self, layer: int) -> Tensor | DeferredScore:
        """What the cache of ``layer`` is ordered by."""
        heads = self.head_scores.get(layer)
        return self.scores[layer] if heads is None else heads

    def dropped(self, columns: Tensor) -> None:
        """Only ``columns`` [B, N'] are left."""
        self._carried, self._prepared, self._noted, self._turned = (
            None if each is None else each.gather(1, columns.to(each.device))
            for each in (self._carried, self._prepared, self._noted, self._turned)
        )
        if self._keys is not None and self.plan.wiring.has_states:
            # A layer with a state shows no keys: those of a layer before it stay the latest.
            index = columns[:, None, :, None].to(self._keys.device)
            shape = (-1, self._keys.shape[1], -1, self._keys.shape[3])
            self._keys = self._keys.gather(2, index.expand(shape))

    def release(self) -> None:
        """Let go of what only the layers needed."""
        self._tables = self._keys = self._hidden = self.tower = self._noted = self._turned = None
        self._released = True

    def _deferred(
        self, layer: int, block: Block, query: Tensor, given: Mapping[str, Any]
    ) -> DeferredScore:
        row = last_rows(query.detach(), block.last, self._at_end(block)).clone()
        facts = {"layer": layer, "hidden": None, "key_valid": block.valid}
        return DeferredScore(
            cast(Score, self.plan.by_attention),
            row,
            {name: given.get(name) for name in ("scaling", "softcap")},
            facts | self._columns(block),
            self.plan.per_head,
        )

    # Views ------------------------------------------------------------------------------------

    def _at_end(self, block: Block) -> bool:
        return block.valid is None and not self.rows.tail

    def _columns(self, block: Block) -> dict[str, Any]:
        """What every view says of the block's columns."""
        return {
            "visual": block.visual,
            "ordinal": block.ordinal,
            "last": block.last,
            "valid": block.valid,
            "group": block.group,
            "images": self.rows.images,
            "grids": self.rows.grids,
            "most_text": max(self.rows.n_text),
            "complete": block.index is None,
            "at_end": self._at_end(block),
            "prepared": _to(self._prepared, block.visual.device),
        }

    def _token_view(self, layer: int, block: Block, hidden: Tensor) -> TokenView:
        device = hidden.device
        return TokenView(
            layer=layer,
            hidden=hidden,
            before=_to(self._hidden, device),
            keys=_to(self._keys, device),
            towers=_to(self.tower, device),
            noted=_to(self._noted, device),
            turned=_to(self._turned, device),
            wanted=self._most_kept(layer, block),
            **self._columns(block.to(device)),
        )

    def _layer_view(
        self,
        layer: int,
        block: Block,
        query: Tensor,
        key: Tensor,
        key_valid: Tensor | None,
        given: Mapping[str, Any],
    ) -> LayerView:
        plan = self.plan
        facts = self._columns(block)
        if plan.ranks is not None:
            facts["over_ranks"] = partial(mean_over_ranks, group=plan.ranks)
        if plan.unrotate is not None:
            own = key[:, :, key.shape[2] - query.shape[2] :]
            facts["unrotate"] = partial(plan.unrotate, query, own, self._tables)
        return LayerView.of(
            query, key, given, layer=layer, hidden=self._hidden, key_valid=key_valid, **facts
        )

    def _most_kept(self, layer: int, block: Block) -> int | None:
        """The most visual tokens of a row that the next drop keeps; None if the whole order counts:
        for annealing, or for budgets per image."""
        schedule = self.plan.schedule
        if block.group is not None or schedule.anneals:
            return None
        drop = next((i for i in range(layer, schedule.num_layers) if schedule.prunes(i)), None)
        return None if drop is None else max(schedule.kept(drop, n) for n in self.rows.n_visual)


def _one_stream(hidden: Tensor) -> Tensor:
    """The hidden states [B, N, D] of a decoder; of one with several streams the first, which the
    others are made of."""
    return hidden[0] if hidden.dim() == 4 else hidden


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
