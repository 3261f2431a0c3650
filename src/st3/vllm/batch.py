"""Worker side: the rows of one forward pass that are still there, and how they rank.

vLLM lays the new tokens of all requests behind each other, [rows, D]. A row is dropped where its
layer's plan says so and comes back, as zeros, behind the last layer. Nothing here waits for the
device: how many tokens are kept is known on the host, only which ones is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from st3.methods.scores import LayerView, TokenView, stage_of
from st3.vllm.columns import Columns
from st3.vllm.plan import Part, Plan
from st3.vllm.prompt import Prompt

Mean = Callable[[Tensor], Tensor]


@dataclass
class Share:
    """One request's share of a batch.

    Attributes:
        start, length: its new tokens are the rows ``start`` to ``start + length``.
        computed: its tokens that are in the cache already.
        prompt: its facts.
        trims: whether it is trimmed.
    """

    start: int
    length: int
    computed: int
    prompt: Prompt
    trims: bool

    @property
    def prefills(self) -> bool:
        """Whether rows of it are dropped in this pass."""
        return self.trims and self.computed == 0

    def skipped(self, plan: Plan, layer: int, block: int) -> int:
        """Empty slots at its head that ``layer`` does not read, whole blocks."""
        if not self.trims:
            return 0
        step = max(0, self.computed - self.prompt.length + 1) if self.computed else 0
        return plan.skipped(layer, self.prompt.n_visual, step, block)

    def dropped(self, plan: Plan, layer: int, block: int) -> int:
        """Rows of it that ``layer`` does not compute."""
        return self.skipped(plan, layer, block) if self.computed == 0 else 0


@dataclass
class Batch:
    """One forward pass.

    Attributes:
        shares: the requests, in the order of their rows.
        block: slots of a block of vLLM's KV cache manager.
        over_ranks: mean over the processes that share a layer's heads.
        slots: for parts with fewer rows, where in the cache each goes; filled by the metadata.
        alive: rows that are left, as indices into all; None while all are.
    """

    plan: Plan
    shares: list[Share]
    block: int
    over_ranks: Mean = lambda score: score
    slots: dict[int, Tensor] = field(default_factory=dict)
    alive: Tensor | None = None
    deepstack: Any = None
    _columns: dict[int, Columns] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list)
    _total: int = 0

    def __post_init__(self) -> None:
        self._starts = [share.start for share in self.shares]
        self.prefills = any(share.prefills for share in self.shares)

    # Rows ---------------------------------------------------------------------------------------

    def enter(
        self, layer: int, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Drop what ``layer`` no longer sees from its inputs, [rows left, D] each."""
        if layer == 0:
            self._begin(hidden)
        if not self.plan.schedule.prunes(layer):
            return hidden, residual
        picked, start, dropped = list[Tensor](), 0, False
        for i, share in enumerate(self.shares):
            rows = self._rows(i)
            stay: Tensor | None = None
            if i in self._columns:
                columns = self._columns[i]
                gone = share.dropped(self.plan, layer, self.block)
                kept = share.prompt.n_visual - gone
                if kept < len(columns.visual):
                    stay, dropped = columns.keep(kept), True
            if stay is None:
                stay = torch.arange(rows, device=hidden.device)
            picked.append(stay + self._starts[i])
            self._starts[i] = start
            start += len(stay)
        if not dropped:
            return hidden, residual
        index = torch.cat(picked)
        self.alive = index if self.alive is None else self.alive[index]
        if self.deepstack is not None:  # what later layers still add to each row
            tensors = self.deepstack.tensors
            tensors.update({name: value[index] for name, value in tensors.items()})
        return hidden[index], None if residual is None else residual[index]

    def leave(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Behind the last layer: all rows again, [rows, D] each, zeros where one was dropped."""
        alive = self.alive
        if alive is None:
            return rows
        full = (of.new_zeros(self._total, of.shape[-1]) for of in rows)
        return tuple(all_.index_copy_(0, alive, of) for all_, of in zip(full, rows, strict=True))

    def positions(self, positions: Tensor) -> Tensor:
        """RoPE's positions, [..., rows], of the rows that are left."""
        return positions if self.alive is None else positions[..., self.alive]

    def _rows(self, i: int) -> int:
        return len(self._columns[i].left) if i in self._columns else self.shares[i].length

    def _span(self, i: int) -> slice:
        return slice(self._starts[i], self._starts[i] + self._rows(i))

    # Scores -------------------------------------------------------------------------------------

    def _begin(self, hidden: Tensor) -> None:
        self._total = hidden.shape[0]
        score: Any = self.plan.score
        prepare = getattr(score, "prepare", None)
        for i, share in enumerate(self.shares):
            if not share.prefills:
                continue
            columns = self._columns[i] = Columns(share.prompt, share.length, hidden.device)
            early = stage_of(score) == "embeds"
            if not early and prepare is None:
                continue
            rows = hidden[share.start : share.start + share.prompt.length]
            view = TokenView(hidden=rows[None], **self._facts(columns, 0))
            if prepare is not None:
                columns.prepared = prepare(view)
            if early:
                columns.score = self.over_ranks(score(view))[0, columns.visual]

    def _facts(self, columns: Columns, layer: int) -> dict[str, Any]:
        return columns.facts(layer, self._wanted(layer, columns.prompt.n_visual))

    def _wanted(self, layer: int, n_visual: int) -> int | None:
        """The most visual tokens that the next drop keeps; None if the whole order counts."""
        schedule = self.plan.schedule
        if schedule.anneals:
            return None
        drop = next((i for i in range(layer, schedule.num_layers) if schedule.prunes(i)), None)
        return None if drop is None else n_visual - self.plan.skipped(drop, n_visual, 0, self.block)

    def attended(
        self, layer: int, query: Tensor, key: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Rank by the attention of ``layer``, for its cache and for the drop behind it.

        Args:
            query, key: [rows left, heads, size] and [rows left, KV heads, size], after RoPE.
        """
        if stage_of(self.plan.score) != "attention" or not self._asks(layer):
            return
        score: Any = self.plan.score
        for i, columns in self._columns.items():
            if not len(columns.visual):
                continue
            start = self._starts[i]
            rows = slice(start, start + len(columns.left) - columns.behind)
            view = LayerView(
                hidden=None,
                query=query[rows].transpose(0, 1)[None],
                key=key[rows].transpose(0, 1)[None],
                scaling=scaling,
                softcap=softcap or None,
                key_valid=None,
                over_ranks=self.over_ranks,
                **self._facts(columns, layer),
            )
            columns.score = self.over_ranks(score(view))[0, columns.visual]

    def _asks(self, layer: int) -> bool:
        schedule = self.plan.schedule
        follows = layer + 1 < schedule.num_layers and schedule.prunes(layer + 1)
        return follows or self.orders(layer)

    def orders(self, layer: int) -> bool:
        """Whether the cache of ``layer`` wants its visual tokens by rising importance."""
        schedule = self.plan.schedule
        return schedule.anneals and layer >= schedule.anneal_from

    def reorder(self, slots: Tensor) -> list[tuple[slice, Tensor]]:
        """For each trimmed prompt its rows among those left, and their slots when the tokens that
        annealing frees first come first.

        Args:
            slots: [rows left], where they were written to be attended.
        """
        found = []
        for i, columns in self._columns.items():
            if columns.score is None:
                continue
            rows = self._span(i)
            moved = torch.empty_like(slots[rows])
            moved[columns.importance()] = slots[rows]
            found.append((rows, moved))
        return found

    # Lengths ------------------------------------------------------------------------------------

    def skips(self, part: Part) -> list[int]:
        """Slots at each request's head that a part does not read."""
        return [share.skipped(self.plan, part.first, self.block) for share in self.shares]

    def drops(self, part: Part) -> list[int]:
        """Rows of each request that a part does not compute."""
        return [share.dropped(self.plan, part.first, self.block) for share in self.shares]


class Current:
    """The pass under way in this process, for the parts of vLLM that get no argument of ours."""

    def __init__(self) -> None:
        self.batch: Batch | None = None


CURRENT = Current()
