"""When a prefill takes its plan's score, of what, and what it keeps for that between layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from st3.engine.parallel import mean_over_ranks
from st3.methods.scores import LayerView, TokenView
from st3.methods.scores.base import last_rows

if TYPE_CHECKING:
    from st3.engine.columns import Block
    from st3.engine.prefill import Prefill

When = Literal["now", "late", "carried"]


class Scoring:
    """The scores of one prefill.

    Attributes:
        by_layer: the score that a layer ranks its cache by, of the columns of its block.
        tables: the position tables given to the layer under way.
        carried: of the present columns, the score that later layers use: one taken before the
            decoder, at the input of the layer under way, or in an earlier layer.
    """

    def __init__(self, prefill: Prefill, tower: Tensor | None) -> None:
        self.prefill = prefill
        self.tower = tower
        self.by_layer: dict[int, Tensor] = {}
        self._late: dict[int, Callable[[], Tensor]] = {}
        self.tables: Any = None
        self.carried: Tensor | None = None
        self._prepared: Tensor | None = None
        self._keys: Tensor | None = None

    @cached_property
    def reads_input(self) -> tuple[bool, ...]:
        """For each layer whether :meth:`at_input` has something to take."""
        plan, ranked = self.prefill.plan, self.prefill.ranked
        prepares = plan.prepare is not None
        later = [plan.stage == "input" and any(of) for of in zip(plan.prunes, ranked, strict=True)]
        return (prepares or plan.stage == "embeds" or later[0], *later[1:])

    def at_input(self, layer: int, hidden: Tensor) -> None:
        """Take the score that is taken at the input of ``layer``, from its columns before any is
        dropped there."""
        plan = self.prefill.plan
        with torch.no_grad():
            if layer == 0 and plan.prepare is not None:
                self._prepared = plan.prepare(self._token_view(layer, hidden))
            if plan.stage != "attention":
                score = cast(Any, plan.score)(self._token_view(layer, hidden))
                self.carried = mean_over_ranks(score, plan.ranks)

    @cached_property
    def chooses(self) -> tuple[bool, ...]:
        """For each layer whether the next layer's tokens are chosen in its attention."""
        plan = self.prefill.plan
        early = plan.stage != "attention"
        return tuple(drops and not early for drops in plan.drops_behind)

    @cached_property
    def _when(self) -> tuple[When | None, ...]:
        """For each layer what to do for a score in its attention; None if none is wanted."""
        plan, ranked, tail = self.prefill.plan, self.prefill.ranked, self.prefill.rows.tail
        wanted = [a or b for a, b in zip(plan.drops_behind, ranked, strict=True)]

        def when(layer: int) -> When | None:
            users = plan.users.get(layer) if plan.stage == "attention" else None
            if users is None:
                return "carried" if wanted[layer] else None
            if not any(wanted[user] for user in users):
                return None
            return "late" if plan.waits[layer] and not tail else "now"

        return tuple(map(when, range(plan.schedule.num_layers)))

    def in_attention(self, layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
        """File the score that ``layer`` ranks by, and by which the layer behind it drops."""
        plan, when = self.prefill.plan, self._when[layer]
        if "keys" in plan.needs:
            self._keys = key[:, :, key.shape[2] - query.shape[2] :].detach()
        if when is None or layer in self.by_layer:  # gradient checkpointing runs it again
            return
        if when == "carried":
            if self.carried is not None:
                self.by_layer[layer] = self.carried.to(query.device)
            return
        if when == "late" and self._files(layer, key):
            self._late[layer] = self._later(layer, query, key, kwargs)
            return
        with torch.no_grad():
            view = self._layer_view(layer, query, key, kwargs)
            self.by_layer[layer] = mean_over_ranks(plan.score(view), plan.ranks)
        if len(plan.users[layer]) > 1:
            self.carried = self.by_layer[layer]

    def _files(self, layer: int, key: Tensor) -> bool:
        """Whether the cache keeps ``key`` until it is filed."""
        cache = self.prefill.cache
        return cache is not None and cache[layer].holds(key)

    def _later(
        self, layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any]
    ) -> Callable[[], Tensor]:
        """Gives the score that ``layer`` has now, of which nothing but the last row is kept."""
        block = self.prefill.block
        row = last_rows(query, block.last, self._at_end(block)).clone()
        if row.requires_grad:
            row, key = row.detach(), key.detach()
        given = {name: kwargs.get(name) for name in ("scaling", "softcap")}
        return partial(self._take, layer, row, key, given, block, self._prepared)

    def _take(
        self,
        layer: int,
        row: Tensor,
        key: Tensor,
        given: dict[str, Any],
        block: Block,
        prepared: Tensor | None,
    ) -> Tensor:
        facts = {"layer": layer, "hidden": None, "key_valid": block.valid, "last_query": row}
        view = LayerView.of(row, key, given, **facts, **self._columns(block, prepared))
        return cast(Any, self.prefill.plan.score)(view)

    def for_cache(self, layer: int) -> Callable[[], Tensor]:
        """Gives the score that the cache of ``layer`` is ordered by."""
        late = self._late.pop(layer, None)
        if late is not None:
            return late
        score = self.by_layer[layer]
        return lambda: score

    def before_drop(self, layer: int) -> Tensor | None:
        """The score by which ``layer`` drops tokens; None if it was not taken."""
        early = self.prefill.plan.stage != "attention"
        return self.carried if early else self.by_layer.get(layer - 1)

    def dropped(self, columns: Tensor) -> None:
        """Only ``columns`` [B, N'] are left."""
        if self.carried is not None:
            self.carried = self.carried.gather(1, columns.to(self.carried.device))
        if self._prepared is not None:
            self._prepared = self._prepared.gather(1, columns.to(self._prepared.device))

    def release(self) -> None:
        """Let go of what only the layers needed."""
        self.tables = self._keys = self.tower = None

    def _most_kept(self, layer: int) -> int | None:
        """The most visual tokens of a row that the next drop keeps; None if the whole order counts:
        for annealing, or for budgets per image."""
        schedule = self.prefill.plan.schedule
        if self.prefill.block.group is not None or schedule.anneals:
            return None
        drop = next((i for i in range(layer, schedule.num_layers) if schedule.prunes(i)), None)
        if drop is None:
            return None
        return max(schedule.kept(drop, n) for n in self.prefill.rows.n_visual)

    # Views ------------------------------------------------------------------------------------

    def _at_end(self, block: Block) -> bool:
        return block.valid is None and not self.prefill.rows.tail

    def _columns(self, block: Block, prepared: Tensor | None) -> dict[str, Any]:
        """What every view says of the block's columns."""
        return {
            "visual": block.visual,
            "ordinal": block.ordinal,
            "last": block.last,
            "valid": block.valid,
            "group": block.group,
            "images": self.prefill.rows.images,
            "complete": block.index is None,
            "at_end": self._at_end(block),
            "prepared": _to(prepared, block.visual.device),
        }

    def _token_view(self, layer: int, hidden: Tensor) -> TokenView:
        return TokenView(
            layer=layer,
            hidden=hidden,
            before=_to(self.prefill.hidden, hidden.device),
            keys=_to(self._keys, hidden.device),
            tower=_to(self.tower, hidden.device),
            wanted=self._most_kept(layer),
            **self._columns(self.prefill.block.to(hidden.device), self._prepared),
        )

    def _layer_view(
        self, layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any]
    ) -> LayerView:
        plan, tables = self.prefill.plan, self.tables
        facts = self._columns(self.prefill.block.to(query.device), self._prepared)
        if plan.ranks is not None:
            facts["over_ranks"] = partial(mean_over_ranks, group=plan.ranks)
        if plan.unrotate is not None:
            own = key[:, :, key.shape[2] - query.shape[2] :]
            facts["unrotate"] = partial(plan.unrotate, query, own, tables)
        return LayerView.of(
            query,
            key,
            kwargs,
            layer=layer,
            hidden=self.prefill.hidden,
            key_valid=self.prefill.valid_keys(layer, query, key),
            **facts,
        )


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
