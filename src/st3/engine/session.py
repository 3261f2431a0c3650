"""From one forward pass to the next: what kind of pass a model runs, and on which stores."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor

from st3.engine.calls import AttentionCall, Cache, Chunk, LayerInputs, Pass
from st3.engine.compiled import CompiledStep
from st3.engine.events import Events, PassEvent, PromptEvent, StepEvent
from st3.engine.kv.base import Store
from st3.engine.kv.joined import JoinedStore
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Phase, Timeline
from st3.engine.masks import Starts
from st3.engine.mixed import MixedPrefill
from st3.engine.mixed_steps import MixedCompiledStep, MixedJoinedStep, MixedStep
from st3.engine.plan import Plan
from st3.engine.prefill import Prefill
from st3.engine.prompt import Block, Rows, read_prompt
from st3.engine.steps import JoinedStep, TextStep
from st3.errors import TrimStateError, UnsupportedModelError
from st3.methods.scores.base import spares_of

PADDED_CONTINUATION = (
    "a padded batch cannot be continued behind a trimmed prompt: continue the rows one by one, or "
    "pad the first turn"
)


class Untouched:
    """A pass of which nothing is changed; observers see its attention."""

    def __init__(self, events: Events, block: Block | None) -> None:
        self.events, self.block = events, block

    def leaves(self, layer: int) -> bool:
        return True

    def enter(self, layer: int, inputs: LayerInputs) -> None:
        return None

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.events.attention(layer, call, self.block)
        return call.run()

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden


class Session:
    """The passes of one trimmed model, one at a time.

    Args:
        active: whether anything of a pass is changed; otherwise it is only observed.
        bucket: columns by which buffers of compiled steps grow; None to decode uncompiled.

    Attributes:
        current: the pass under way, or None.
    """

    def __init__(self, plan: Plan, active: bool, bucket: int | None, events: Events) -> None:
        self.plan, self.active, self.bucket, self.events = plan, active, bucket, events
        self.current: Pass | None = None
        self._chunk: Chunk | None = None
        self._stores: dict[int, Store] = {}
        self._timeline: Timeline | None = None
        self._compiled: CompiledStep | None = None
        self._known: dict[Starts, Tensor] = {}

    # Passes -----------------------------------------------------------------------------------

    def begin(self, chunk: Chunk) -> None:
        """The text model is about to run: decide what kind of pass this is. Changes state."""
        self.abandon()
        self._chunk = chunk
        prompt = self._read(chunk)
        stores = chunk.cache.stores if chunk.cache is not None else {}
        if not self.active:
            self._begin_untouched(chunk, prompt)
        elif prompt is not None:
            self._begin_prefill(chunk, *prompt)
        elif stores:
            self._begin_step(chunk, stores)
        if prompt is None:
            self._tell_of_text(chunk, stores)

    def end(self, hidden: Tensor, keep: bool = False) -> Tensor:
        """The text model's layers have run. Changes state.

        Args:
            keep: whether layers may run again, as gradient checkpointing lets them in backward.

        Returns:
            the hidden states [B, T, D] of the chunk's own columns.
        """
        current, chunk = self.current, self._chunk
        if chunk is None:
            return hidden
        if current is not None:
            hidden = current.finish(hidden)
            if isinstance(current, Prefill):
                _check_attended(current)
        if self._timeline is not None:
            self._timeline.phase = Phase.IDLE
        cache = chunk.cache
        self.events.passed(
            PassEvent(
                prompt=chunk.visual is not None,
                tokens=chunk.tokens,
                length=chunk.past + chunk.tokens if cache is not None else 0,
                stores=list(self._stores.values()),
                entry_bytes=cache.entry_bytes if cache is not None else tuple,
            )
        )
        self._chunk, self._stores, self._timeline = None, {}, None
        if not keep:
            self.current = None
        return hidden

    def abandon(self) -> None:
        """Forget a pass that was broken off. Changes state."""
        if self._timeline is not None:
            self._timeline.phase = Phase.IDLE
        if self._compiled is not None:
            self._compiled.stores = {}
        self.current = self._chunk = self._timeline = None
        self._stores = {}

    # What kind of pass ------------------------------------------------------------------------

    def _read(self, chunk: Chunk) -> tuple[Rows, Block] | None:
        """The chunk's rows; None if it holds no visual token."""
        if chunk.visual is None:
            return None
        mask = chunk.attention_mask
        if mask is not None:
            mask = mask[:, -chunk.tokens :].to(chunk.embeds.device)
        tail = min(chunk.candidates, chunk.tokens - 1)
        rows, block = read_prompt(chunk.visual, mask, tail, self.plan.per_image, chunk.sizes)
        if not any(rows.n_visual):
            return None
        if chunk.grids is not None and "grids" in self.plan.needs:
            rows = replace(rows, grids=chunk.grids(rows.whole))
        return rows, block

    def _begin_untouched(self, chunk: Chunk, prompt: tuple[Rows, Block] | None) -> None:
        if prompt is not None:
            self._tell(chunk, *prompt, None)
        if self.events.attends:
            self.current = Untouched(self.events, prompt[1] if prompt else None)

    def _begin_prefill(self, chunk: Chunk, rows: Rows, block: Block) -> None:
        past = chunk.past
        if past and block.valid is not None:
            raise TrimStateError(PADDED_CONTINUATION)
        stores, timeline = None, Timeline()
        if chunk.cache is not None:
            stores = self._stores_for(chunk.cache, past)
            timeline = next(iter(stores.values())).timeline
            self._stores = dict(stores)
        timeline.phase = Phase.APPEND if past else Phase.PREFILL
        timeline.start, timeline.tokens = past, rows.length
        timeline.dense_from = past + rows.length - rows.tail
        if past and stores is not None:
            self._write_and_evict(stores)
        else:
            timeline.prompt = rows.length - rows.tail
        self._timeline = timeline
        tower = None
        if chunk.tower is not None and chunk.visual is not None:
            tower = chunk.tower(chunk.visual)
        lacks = tower is None and "tower" in spares_of(self.plan.score)
        self._tell(chunk, rows, block, timeline, lacks)
        given = self.plan, rows, block, stores, timeline, past > 0, tower, self.events
        if self.plan.wiring.plain and chunk.late is None:
            self.current = Prefill(*given)
        else:
            self.current = MixedPrefill(*given, late=chunk.late)

    def _stores_for(self, cache: Cache, past: int) -> dict[int, KVStore]:
        """The cache's stores; put into it, if it has none yet or starts anew."""
        if past and (stores := cache.stores):
            return cast(dict[int, KVStore], stores)
        plan, timeline = self.plan, Timeline()
        if past:
            timeline.phase, timeline.tokens = Phase.PREFILL, past

        def make(layer: int) -> KVStore:
            return KVStore(
                layer,
                plan.schedule,
                timeline,
                plan.windows[layer],
                recalls=plan.recalls,
                keeps_text=plan.rerank is not None,
            )

        return cache.install(make)

    def _begin_step(self, chunk: Chunk, stores: dict[int, Store]) -> None:
        first = next(iter(stores.values()))
        timeline = first.timeline
        joined = isinstance(first, JoinedStore)
        mask, tokens = chunk.attention_mask, chunk.tokens
        # A single token is never padding: no need to look.
        if tokens > 1 and not joined and mask is not None and not bool(mask[:, -tokens:].all()):
            raise TrimStateError(PADDED_CONTINUATION)
        timeline.phase, timeline.start, timeline.tokens = Phase.APPEND, first.length, tokens
        self._timeline, self._stores = timeline, dict(stores)
        self._write_and_evict(stores)
        plan, events = self.plan, self.events
        if joined:
            own = cast(dict[int, JoinedStore], stores)
            together = JoinedStep if plan.wiring.plain else MixedJoinedStep
            self.current = together(plan, own, timeline, events)
        elif self.bucket is not None and tokens == 1:
            step = self._compiled
            if step is None or step.timeline is not timeline:
                compiled = CompiledStep if plan.wiring.plain else MixedCompiledStep
                step = self._compiled = compiled(plan, timeline, self.bucket, events)
            step.prepare(cast(dict[int, KVStore], stores))
            self.current = step
        else:
            own_stores = cast(dict[int, KVStore], stores)
            kind = TextStep if plan.wiring.plain else MixedStep
            self.current = kind(plan, own_stores, timeline, events, self._known)

    def _write_and_evict(self, stores: dict[int, KVStore] | dict[int, Store]) -> None:
        """Before a pass behind a prompt makes its masks: write prompts that wait and, where a
        buffer is full, evict what no later token sees."""
        with self.events.span("write"):
            for layer, store in stores.items():
                if isinstance(store, KVStore):
                    columns = store.write()
                    if columns is not None:
                        self.events.written(layer, columns)
                store.evict_if_full()

    def _tell_of_text(self, chunk: Chunk, stores: dict[int, Store]) -> None:
        if chunk.past:
            rows = int(chunk.embeds.shape[0])
            self.events.step(StepEvent(chunk.past, chunk.tokens, rows, stores))
        else:
            self.events.text_prompt()

    def _tell(
        self, chunk: Chunk, rows: Rows, block: Block, timeline: Timeline | None, lacks: bool = False
    ) -> None:
        past, mask = chunk.past, chunk.attention_mask
        if past and mask is not None:
            n_past = tuple(mask[:, :past].sum(1).tolist())
        else:
            n_past = (past,) * rows.batch
        budgets = self.plan.budgets(rows)
        self.events.prompt(PromptEvent(rows, block, budgets, chunk, past, n_past, timeline, lacks))


def _check_attended(prefill: Prefill) -> None:
    if prefill.stores is None or prefill.extends:
        return
    missing = [layer for layer in prefill.stores if layer not in prefill.attended]
    if missing:
        raise UnsupportedModelError(
            f"decoder layers {missing} did not call their attention through transformers' "
            "attention interface"
        )
