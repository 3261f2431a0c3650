"""The pass of a prompt with visual tokens, decoder layer by decoder layer.

``enter`` runs in the pre-hook of each decoder layer and shrinks what goes in; ``attend`` runs in
place of the layer's attention function, scores the visual tokens and chooses those that the next
layer sees; ``finish`` runs on the text model's output and files keys and values.

Between two layers' matrix products all else has left the processor's caches, and even a small step
then takes many times what it takes in a loop. So what can be done once, or for all layers in a row,
is not done between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.cache import TrimmedLayer
from st3.engine.clock import Clock
from st3.engine.columns import (
    Block,
    Memo,
    Rows,
    cache_order,
    gather_columns,
    gather_positions,
    memoised,
    rank_visual,
    select,
)
from st3.engine.layout import is_lean
from st3.engine.masks import as_bool, causal, finish, gather_mask, is_plain, prefill_mask
from st3.engine.plan import Attend, Plan
from st3.engine.scoring import Scoring
from st3.errors import TrimStateError

# Keyword arguments of decoder layers that Prefill.enter gathers in their own way.
_HANDLED = {"hidden_states", "attention_mask", "position_ids", "position_embeddings"}


@dataclass
class Prefill:
    """A prompt with visual tokens.

    Attributes:
        rows: facts of the batch.
        block: columns of the layer under way.
        attention_mask: the caller's [B, T] mask of this chunk, or None.
        cache: the layers to fill; None without a cache.
        extends: whether an earlier turn is in the cache (its visual tokens keep their annealing;
            those of this chunk are pruned, but not annealed).
        tower: [B, T], what the vision tower's class token attends to; None unless the score asks.
        scoring: the scores taken so far.
    """

    plan: Plan
    rows: Rows
    block: Block
    attention_mask: Tensor | None
    cache: list[TrimmedLayer] | None
    clock: Clock
    extends: bool = False
    tower: InitVar[Tensor | None] = None
    blocks: dict[int, Block] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    attended: set[int] = field(default_factory=set)
    hidden: Tensor | None = None
    scoring: Scoring = field(init=False)
    _waiting: list[tuple[int, Block, bool]] = field(default_factory=list)
    _lean: bool | None = None
    _shared: dict[tuple[int, ...], tuple[dict[str, Any], Any]] = field(default_factory=dict)
    _plain: Memo = field(default_factory=dict)

    def __post_init__(self, tower: Tensor | None) -> None:
        self.scoring = Scoring(self, tower)

    @property
    def scores(self) -> dict[int, Tensor]:
        """The score that each layer ranks its cache by, [B, N] of its columns."""
        return self.scoring.by_layer

    def enter(
        self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Drop what ``layer`` no longer sees from its inputs: the hidden states [B, N, D], further
        positional arguments and, in place, the keyword arguments."""
        if layer not in self.blocks:
            if self.scoring.reads_input[layer]:
                self.scoring.at_input(layer, hidden)
            if self.plan.prunes[layer]:
                self._prune(layer)
            else:
                self.blocks[layer] = self.block
        # Gradient checkpointing may run a layer again: its block and columns are replayed.
        self.block = self.blocks[layer]
        if layer in self.columns:
            hidden = gather_columns(hidden, self.columns[layer])
        self.hidden = hidden
        mask, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        self.scoring.tables = tables
        if self.block.index is None and not self.extends:
            return (hidden, *args)
        kwargs.update(self._narrowed(mask, tables, hidden))
        if self.extends:
            kwargs["attention_mask"] = self._extension_mask(layer, mask, hidden)
        self.scoring.tables = kwargs.get("position_embeddings")
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name not in _HANDLED:
                kwargs[name] = self._per_token(value)
        return (hidden, *map(self._per_token, args))

    def _per_token(self, value: Any) -> Any:
        """Inputs with one entry per token, [B, T, ...], as experts' or layers' inputs."""
        index, length = self.block.index, self.rows.length
        if index is None or not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if value.shape[0] != index.shape[0] or value.shape[1] != length:
            return value
        index = index.to(value.device)
        flat = gather_columns(value.reshape(*value.shape[:2], -1), index)
        return flat.view(*index.shape, *value.shape[2:])

    @cached_property
    def ranked(self) -> tuple[bool, ...]:
        """For each layer whether the cache will want an order of its visual tokens."""
        if self.cache is None or self.extends:
            return (False,) * self.plan.schedule.num_layers
        return self.plan.anneals(self.rows)

    @cached_property
    def _kept(self) -> dict[int, list[list[int]]]:
        """For each layer that visual tokens leave, those that enter it, by row and budget."""
        kept, budgets = self.plan.schedule.kept, self.plan.budgets(self.rows)
        return {
            layer: [[kept(layer, n) for n in row] for row in budgets]
            for layer, prunes in enumerate(self.plan.prunes)
            if prunes
        }

    def _prune(self, layer: int) -> None:
        score = self.scoring.before_drop(layer)
        if score is None:
            raise TrimStateError(
                f"decoder layer {layer - 1} ran without a score: its attention was not called "
                "through transformers' attention interface"
            )
        kept = self._kept[layer]
        block, columns = select(self.block.to(score.device), score, kept)
        self.blocks[layer], self.columns[layer] = block, columns
        self.scoring.dropped(columns)
        if self.extends and len(set(block.counts)) > 1:
            raise TrimStateError(
                "a new image in a continued batch needs rows of equal length: continue the "
                "rows one by one"
            )

    def _narrowed(self, mask: Any, tables: Any, hidden: Tensor) -> dict[str, Any]:
        """What becomes of the mask and of the position tables, which a text model shares between
        layers, and of the position ids, in the block under way."""
        key = id(self.block), id(mask), id(tables)
        if key not in self._shared:
            # Flash attention takes jumps in batch-1 position ids for packed sequences and would cut
            # the prompt there, silently.
            found: dict[str, Any] = {"position_ids": None}
            if not self.extends:
                found["attention_mask"] = self._mask(mask, hidden)
            if tables is not None and self.block.index is not None:
                found["position_embeddings"] = _gather_tables(tables, self.block.index)
            self._shared[key] = found, (mask, tables)  # held, so that their ids stay their own
        return self._shared[key][0]

    def _mask(self, mask: Any, hidden: Tensor) -> Tensor | None:
        """The mask of left-aligned rows."""
        if mask is None or mask.dim() == 2 or self._is_plain(mask):
            return prefill_mask(hidden.shape[1], self.plan.kind, hidden.dtype, hidden.device)
        block = self.block.to(mask.device)
        return gather_mask(mask, block.source_columns(), block.valid)

    def _is_plain(self, mask: Tensor) -> bool:
        return bool(memoised(self._plain, mask, lambda: is_plain(mask, self.attention_mask)))

    def _extension_mask(self, layer: int, mask: Any, hidden: Tensor) -> Tensor:
        """Keys are an earlier turn's live columns, then this chunk's."""
        past = self._cache_layer(layer)
        step = self.clock.step(self.clock.start)
        starts = past.row_starts(step)
        first, end = min(starts), past.end
        index = self.block.source_columns()
        batch, columns = index.shape
        place = torch.arange(first, end, device=index.device)
        seen = place >= torch.tensor(starts, device=index.device)[:, None]
        seen = seen[:, None, None, :].expand(batch, 1, columns, end - first)
        window = self.plan.windows[layer]
        if window is not None:
            query = self.clock.start + index
            old = past.positions(first).to(index.device)
            near = old[:, None, None, :] > (query - window)[:, None, :, None]
            seen = seen & near
        chunk = mask[..., -self.rows.length :] if mask is not None else None
        if chunk is None or mask.dim() == 2:
            own = causal(columns, columns, index.device).expand(batch, 1, columns, columns)
        else:
            own = as_bool(gather_mask(chunk.to(index.device), index, self.block.valid))
        return finish(torch.cat([seen, own], dim=-1), self.plan.kind, hidden.dtype)

    def _cache_layer(self, layer: int) -> TrimmedLayer:
        if self.cache is None:
            raise TrimStateError("an earlier turn can only be continued with its cache")
        return self.cache[layer]

    def attend(
        self, layer: int, base: Attend, module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Run the attention ``base``; score the visual tokens and choose those that stay."""
        self.block = self.block.to(query.device)  # layers may be spread over devices
        self.scoring.in_attention(layer, query, key, kwargs)
        # Flash attention takes no mask per query: there candidates see what the prompt sees.
        if self.rows.tail and self.ranked[layer] and self.plan.kind != "flash":
            mask = self._tail_mask(layer, query, mask)
        if self.scoring.chooses[layer] and layer + 1 not in self.blocks:
            self._prune(layer + 1)
        output = base(module, query, key, value, mask, **kwargs)
        if self.cache is None:
            return output
        past = self.cache[layer]
        if self.extends:
            past.note_positions(self.clock.start + self.block.source_columns())
        elif layer not in self.attended:
            self.attended.add(layer)
            if self._lean is None:  # asked of the first layer only: others are made alike
                self._lean = is_lean(*past.given)
            self._waiting.append((layer, self.block, past.holds(key)))
            if not self._lean:
                self._file()
        return output

    def _file(self) -> None:
        """Let the cache take over what waiting layers have given to it."""
        if self.cache is None:
            return
        budgets, stays = self.plan.budgets(self.rows), self.plan.stays
        dense = self.plan.kind == "sdpa"
        for layer, block, holds in self._waiting:
            past = self.cache[layer]
            past.size_first = dense and holds and decode.wants_size_first(past.given[0])
            score = self.scoring.for_cache(layer) if self.ranked[layer] else None
            order = partial(_order, block, score, partial(stays, layer, self.rows))
            past.store(
                order,
                block.source_columns(),
                block.counts,
                block.n_kept,
                budgets,
                ranked=self.ranked[layer],
            )
        self._waiting.clear()

    def valid_keys(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """[B, K] bool, keys that are neither padding nor dropped, nor of an earlier turn and behind
        the sliding window of this chunk's first token (which may be freed); None when all are."""
        valid = self.block.valid
        if not self.extends:
            return valid
        past = self._cache_layer(layer)
        starts = past.row_starts(self.clock.step(self.clock.start))
        first, n_old = min(starts), key.shape[2] - query.shape[2]
        place = torch.arange(first, first + n_old, device=key.device)
        old = place >= torch.tensor(starts, device=key.device)[:, None]
        window = self.plan.windows[layer]
        if window is not None:
            old &= past.positions(first)[:, :n_old].to(key.device) > self.clock.start - window
        new = valid if valid is not None else old.new_ones(query.shape[0], query.shape[2])
        return torch.cat([old, new], dim=1)

    def _tail_mask(self, layer: int, query: Tensor, mask: Tensor | None) -> Tensor | None:
        """Candidates of assisted decoding see what their decode step would see."""
        block, columns, tail = self.block, query.shape[2], self.rows.tail
        seen = causal(columns, columns, query.device) if mask is None else as_bool(mask)
        seen = seen.expand(query.shape[0], 1, columns, columns).clone()
        rank = rank_visual(block, self.scores[layer])
        group = torch.zeros_like(rank) if block.group is None else block.group
        (budgets,) = self.plan.budgets(self.rows)
        for place in range(tail):
            shown = [self.plan.schedule.visible(layer, n, place + 1) for n in budgets]
            gone = block.visual & (rank >= torch.tensor(shown, device=rank.device)[group])
            seen[:, :, columns - tail + place] &= ~gone[:, None]
        return finish(seen, self.plan.kind, query.dtype)

    def finish(self, hidden: Tensor) -> Tensor:
        """Back to the prompt's own columns [B, T, D]: zeros where visual tokens were dropped, so
        that logits_to_keep and labels mean what they mean on the bare model."""
        self._file()
        self.hidden = None
        self._shared.clear()
        self._plain.clear()
        self.scoring.release()
        self.block = self.block.to(hidden.device)
        index = self.block.index
        if index is None:
            return hidden
        batch, _, size = hidden.shape
        if self.block.valid is not None:
            hidden = hidden.masked_fill(~self.block.valid[..., None], 0)
        offset = torch.arange(batch, device=index.device)[:, None] * self.rows.length
        full = hidden.new_zeros(batch * self.rows.length, size)
        full.index_copy_(0, (index + offset).flatten(), hidden.reshape(-1, size))
        return full.view(batch, self.rows.length, size)


def _order(
    block: Block,
    score: Callable[[], Tensor] | None,
    stays: Callable[[], Sequence[Sequence[int]]],
) -> Tensor | None:
    return cache_order(block, score() if score else None, stays())


def _gather_tables(tables: Any, index: Tensor) -> Any:
    if isinstance(tables, Tensor):
        return gather_positions(tables, index.to(tables.device))
    return type(tables)(_gather_tables(table, index) for table in tables)
