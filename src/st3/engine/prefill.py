"""The pass of a prompt with visual tokens, decoder layer by decoder layer.

``enter`` runs before each decoder layer and shrinks what goes in; ``attend`` runs in place of the
layer's attention function, shows it to the ranker and chooses the tokens that the next layer sees;
``finish`` runs behind the last layer and hands keys and values to the cache.

Work between two layers runs with cold processor caches and takes many times what it takes in a
loop. So what can be done once, or for all layers in a row, is not done between layers.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from st3.engine import decode
from st3.engine.calls import AttentionCall, LayerInputs
from st3.engine.candidates import candidates_mask
from st3.engine.events import Events
from st3.engine.kv.layout import is_lean
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Timeline
from st3.engine.masks import (
    finish,
    gather_mask,
    is_plain,
    own_keys,
    prefill_mask,
    visible_keys,
)
from st3.engine.memo import Memo
from st3.engine.plan import Budgets, Plan
from st3.engine.prompt import Block, Rows
from st3.engine.ranker import Ranker
from st3.engine.select import (
    counts_above,
    gather_columns,
    gather_tables,
    gather_tokens,
    scatter_columns,
    select,
)
from st3.errors import TrimStateError
from st3.methods.upload import upload


class Prefill:
    """A prompt with visual tokens, in a decoder whose layers all have KV entries of their own.

    Args:
        rows, block: what was read of the prompt.
        stores: the KV stores to fill, by decoder layer; None without a cache.
        tower: [looks, B, T], what the vision tower attends to; None unless the score asks.

    Attributes:
        block: columns of the layer under way.
        blocks: columns of each layer.
        extends: whether an earlier turn is in the cache (its visual tokens keep their annealing;
            those of this chunk are pruned, but not annealed).
        attended: for each layer whose attention was seen its columns, and whether the cache shall
            hold its keys size first.
    """

    ends_together = False  # whether ragged rows end in the same column, and not begin in it

    def __init__(
        self,
        plan: Plan,
        rows: Rows,
        block: Block,
        stores: dict[int, KVStore] | None,
        timeline: Timeline,
        extends: bool,
        tower: Tensor | None,
        events: Events,
    ) -> None:
        self.plan, self.rows, self.block, self._valid = plan, rows, block, block.valid
        self.stores, self.timeline, self.extends, self.events = stores, timeline, extends, events
        self.budgets = plan.budgets(rows)
        nothing = (False,) * plan.num_layers
        self.ordered = nothing if stores is None or extends else plan.anneals(self.budgets)
        self.ranker = Ranker(plan, rows, self.ordered, tower)
        self.blocks: dict[int, Block] = {}
        self.attended: dict[int, tuple[Block, bool]] = {}
        self._columns: dict[int, Tensor] = {}  # of the layer before, that a layer begins with
        self._shared = Memo()

    @cached_property
    def _kept(self) -> dict[int, Budgets]:
        """For each layer that visual tokens leave, those that enter it, by row and budget."""
        drops = (layer for layer, prunes in enumerate(self.plan.prunes) if prunes)
        return {layer: self.plan.kept(layer, self.budgets) for layer in drops}

    # Before a layer ---------------------------------------------------------------------------

    def leaves(self, layer: int) -> bool:
        return False

    def enter(self, layer: int, inputs: LayerInputs) -> None:
        """Drop what ``layer`` no longer sees from its inputs."""
        if layer == 0 and any(self.plan.prunes) and not self.extends:
            # Looked at while the device has little to do, so that the host waits for no layer.
            self._is_plain(inputs.mask)
        self._choose_block(layer, inputs.hidden)
        if layer in self._columns:
            inputs.hidden = gather_columns(inputs.hidden, self._columns[layer])
        if self.block.index is not None or self.extends:
            self._narrow(layer, inputs)
        self.ranker.entered(inputs.hidden, inputs.tables)

    def _choose_block(self, layer: int, hidden: Tensor) -> None:
        if layer not in self.blocks:
            if self.ranker.reads_input(layer):
                with self.events.span("score"):
                    self.ranker.observe_input(layer, self.block, hidden)
                if self.plan.above is not None:
                    self._count(self.plan.above)
            if self.plan.prunes[layer] and self._kept[layer] != self.block.kept:
                self._drop(layer)
            else:
                self.blocks[layer] = self.block
        # Gradient checkpointing may run a layer again: its block and columns are replayed.
        self.block = self.blocks[layer]

    def _count(self, above: float) -> None:
        """Let the data of each row say of how many tokens the schedule's shares are."""
        score = self.ranker.for_drop(0)
        if score is not None:
            self.budgets = counts_above(self.block.to(score.device), score, above)
            self.events.counted(self.budgets)

    def _drop(self, layer: int) -> None:
        """Choose the tokens that enter ``layer``."""
        score = self.ranker.for_drop(layer)
        if score is None:
            raise TrimStateError(
                f"decoder layer {layer - 1} ran without a score: its attention was not called "
                "through transformers' attention interface"
            )
        block = self.block.to(score.device)
        block, columns = select(block, score, self._kept[layer], right=self.ends_together)
        if self.extends and len(set(block.counts)) > 1:
            raise TrimStateError(
                "a new image in a continued batch needs rows of equal length: continue the "
                "rows one by one"
            )
        self.blocks[layer], self._columns[layer] = block, columns
        self.ranker.dropped(columns)
        self.events.kept(layer, block)

    def _narrow(self, layer: int, inputs: LayerInputs) -> None:
        """Bring mask, position tables and further inputs to the columns of the block."""
        inputs.changed = True
        inputs.mask = self._narrow_mask(layer, inputs.mask, inputs.hidden)
        index, tables = self.block.index, inputs.tables
        if index is not None:
            if tables is not None:
                make = partial(gather_tables, tables, index)
                inputs.tables = self._shared.once(tables, make, id(self.block))
            for name, value in inputs.others.items():
                inputs.others[name] = gather_tokens(value, index, self.rows.length)

    def _narrow_mask(self, layer: int, mask: Any, hidden: Tensor) -> Any:
        if self.extends:
            return self._extension_mask(layer, mask, hidden)
        # A text model shares masks and tables between layers.
        return self._shared.once(mask, lambda: self._mask(mask, hidden), id(self.block))

    def _mask(self, mask: Any, hidden: Tensor) -> Tensor | None:
        """The mask of left-aligned rows."""
        if self._is_plain(mask):
            return prefill_mask(hidden.shape[-2], self.plan.kind, hidden.dtype, hidden.device)
        block = self.block.to(mask.device)
        return gather_mask(mask, block.source_columns(), block.valid)

    def _is_plain(self, mask: Any) -> bool:
        """Whether left-aligned rows need no mask for what ``mask`` says."""
        if mask is None or mask.dim() == 2:
            return True
        return bool(self._shared.once(mask, lambda: is_plain(mask, self._valid)))

    # In a layer -------------------------------------------------------------------------------

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Run the attention; score the visual tokens and choose those that the next layer sees."""
        self.block = self.block.to(call.query.device)  # layers may be spread over devices
        store = None if self.stores is None else self.stores[layer]
        self.events.attention(layer, call, self.block)
        self._rank(layer, call, store)
        # Flash attention takes no mask per query: there candidates see what the prompt sees.
        if self.rows.tail and self.ordered[layer] and self.plan.kind != "flash":
            score, (budgets,), tail = self.ranker.for_cache(layer), self.budgets, self.rows.tail
            call.mask = candidates_mask(self.plan, layer, self.block, score, budgets, call, tail)
        chooses = self.plan.drops_behind[layer] and self.plan.by_attention is not None
        if chooses and layer + 1 not in self.blocks:
            self._drop(layer + 1)
        with self.events.span("model"):
            output = call.run()
        if store is not None:
            self._attended(layer, store, call)
        return output

    def _rank(self, layer: int, call: AttentionCall, store: KVStore | None) -> None:
        may_defer = self._holds(store, call) and not self.rows.tail
        known = layer in self.ranker.scores
        with self.events.span("score"):
            self.ranker.observe(
                layer,
                self.block,
                call.query,
                call.key,
                self._valid_keys(layer, call.query, call.key),
                call.given,
                may_defer,
            )
        score = self.ranker.scores.get(layer)
        if isinstance(score, Tensor) and not known:
            self.events.scored(layer, score)

    def _holds(self, store: KVStore | None, call: AttentionCall) -> bool:
        """Whether the cache holds the keys that attention reads, and not a form of its own."""
        return store is not None and not self.extends and store.received.key is call.key

    def _attended(self, layer: int, store: KVStore, call: AttentionCall) -> None:
        if self.extends:
            store.note_positions(self.timeline.start + self.block.source_columns())
        elif layer not in self.attended:
            dense = self.plan.kind == "sdpa" and self._holds(store, call)
            self.attended[layer] = self.block, dense and decode.wants_size_first(call.key)
            if not is_lean(store.received.key, store.received.value):
                self._admit(layer)  # or what the keys are a part of would be kept with them

    def _valid_keys(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """[B, K] bool, keys that are neither padding nor dropped, nor of an earlier turn and behind
        the sliding window of this chunk's first token (which may be freed); None when all are."""
        valid = self.block.valid
        if not self.extends:
            return valid
        past = self._store(layer)
        starts = past.row_starts(self.timeline.step(self.timeline.start))
        first, n_old = min(starts), key.shape[2] - query.shape[2]
        place = torch.arange(first, first + n_old, device=key.device)
        old = place >= upload(starts, key.device)[:, None]
        window = self.plan.windows[layer]
        if window is not None:
            stored = past.positions(first)[:, :n_old].to(key.device)
            old &= stored > self.timeline.start - window
        new = valid if valid is not None else old.new_ones(query.shape[0], query.shape[2])
        return torch.cat([old, new], dim=1)

    # Behind the last layer --------------------------------------------------------------------

    def finish(self, hidden: Tensor) -> Tensor:
        """Back to the prompt's own columns [B, T, D]: zeros where visual tokens were dropped, so
        that logits_to_keep and labels mean what they mean on the bare model."""
        for layer in self.attended:
            if self.stores is not None and not self.stores[layer].rows:
                self._admit(layer)
        self._shared.clear()
        self.ranker.release()
        self.block = self.block.to(hidden.device)
        return scatter_columns(hidden, self.block, self.rows.length)

    def _admit(self, layer: int) -> None:
        """Let the cache of ``layer`` take over the prompt that it was given."""
        block, size_first = self.attended[layer]
        score = self.ranker.for_cache(layer) if self.ordered[layer] else None
        columns = self._store(layer).admit(block, score, self.budgets, size_first)
        if columns is not None:
            self.events.written(layer, columns)

    # An earlier turn in the cache -------------------------------------------------------------

    def _store(self, layer: int) -> KVStore:
        if self.stores is None:
            raise TrimStateError("an earlier turn can only be continued with its cache")
        return self.stores[layer]

    def _extension_mask(self, layer: int, mask: Any, hidden: Tensor) -> Tensor:
        """Keys are an earlier turn's visible columns, then this chunk's."""
        past, start = self._store(layer), self.timeline.start
        index, window = self.block.source_columns(), self.plan.windows[layer]
        starts = past.row_starts(self.timeline.step(start))
        seen = visible_keys(starts, min(starts), past.end, index.shape[1], index.device)
        if window is not None:
            old = past.positions(min(starts)).to(index.device)
            near = old[:, None, None, :] > (start + index - window)[:, None, :, None]
            seen = seen & near
        own = own_keys(mask, index, self.block.valid, self.rows.length)
        return finish(torch.cat([seen, own], dim=-1), self.plan.kind, hidden.dtype)
