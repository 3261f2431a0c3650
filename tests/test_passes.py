"""Passes behind an earlier one, on tensors alone: which stored keys each layer is shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import st3
from st3.engine.calls import AttentionCall, LayerInputs
from st3.engine.events import Events, Observer
from st3.engine.kv.base import Store
from st3.engine.kv.joined import JoinedStore
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Phase, Timeline
from st3.engine.plan import Plan
from st3.engine.prefill import Prefill
from st3.engine.prompt import read_prompt
from st3.engine.steps import JoinedStep, TextStep
from tests.test_ranker import VISUAL, Spy, plan_of
from tests.test_stores import WHOLE, entries, pair, sequence

WINDOW = 4


def plan_with(score: Any, *windows: int | None) -> Plan:
    plan = plan_of(score, *[1.0] * len(windows))
    return replace(plan, windows=windows)


def call_of(keys: Tensor, values: Tensor, queries: int, mask: Any) -> AttentionCall:
    """Of an attention that gives back its queries."""

    def base(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        return query.transpose(1, 2), None

    query = torch.randn(len(keys), 2, queries, 2)
    return AttentionCall(base, None, query, keys, values, mask, {})


def shown(run: Any, store: Store, tokens: int) -> tuple[Any, Tensor]:
    """Run a pass over one layer: its mask, and the original columns of the keys."""
    inputs = LayerInputs(torch.zeros(len(store.rows), tokens, 8))
    run.enter(0, inputs)
    keys, values = store.append(*pair(len(store.rows), tokens))
    run.attend(0, call_of(keys, values, tokens, inputs.mask))
    columns = keys.shape[2]
    return inputs.mask, store.positions(store.end - columns)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_step_sees_its_window_whatever_the_length(tokens: int) -> None:
    """Also where the text has just grown longer than the window."""
    timeline = Timeline(Phase.PREFILL, tokens=2, prompt=2, dense_from=2)
    plan = plan_with(Spy("attention"), WINDOW)
    store = KVStore(0, plan.schedule, timeline, WINDOW)
    _, block = read_prompt(torch.zeros(1, 2, dtype=torch.bool), None, 0, per_image=False)
    store.receive(*pair(1, 2))
    store.admit(block, None, [()])
    for _ in range(12):
        timeline.phase, timeline.start, timeline.tokens = Phase.APPEND, store.length, tokens
        store.write()
        store.evict_if_full()
        run = TextStep(plan, {0: store}, timeline, Events(), {})
        mask, places = shown(run, store, tokens)
        for q in range(tokens):
            at = timeline.start + q
            seen = places[0] if mask is None else places[0][mask[0, 0, q]]
            if mask is None and tokens > 1:
                seen = seen[seen <= at]
            assert seen.tolist() == list(range(max(0, at - WINDOW + 1), at + 1))


@pytest.mark.parametrize("lengths", [(2, 1), (1, 3), (2, 2)])
def test_each_row_of_a_joined_step_sees_its_own_window(lengths: tuple[int, int]) -> None:
    own = [sequence(WHOLE, length) for length in lengths]
    plan = plan_with(Spy("attention"), WINDOW)
    store = JoinedStore(0, own, Timeline(), WINDOW)
    store.fill([entries(length) for length in lengths])
    for _ in range(12):
        store.timeline.start, store.timeline.tokens = store.length, 1
        store.evict_if_full()
        mask, places = shown(JoinedStep(plan, {0: store}, store.timeline, Events()), store, 1)
        for row, one in enumerate(own):
            seen = places[row] if mask is None else places[row][mask[row, 0, 0]]
            assert seen.tolist() == list(range(max(0, one.length - WINDOW + 1), one.length + 1))
            one.steps += 1
        store.synchronise()


def test_several_tokens_see_what_stands_before_each_of_them() -> None:
    """Kernels that are given no mask would take the first key for the first query's own."""
    plan = plan_with(Spy("attention"), None)
    timeline = Timeline(Phase.PREFILL, tokens=2, prompt=2, dense_from=2)
    store = KVStore(0, plan.schedule, timeline)
    _, block = read_prompt(torch.zeros(1, 2, dtype=torch.bool), None, 0, per_image=False)
    store.receive(*pair(1, 2))
    store.admit(block, None, [()])
    timeline.phase, timeline.start, timeline.tokens = Phase.APPEND, 2, 2
    store.write()
    inputs = LayerInputs(torch.zeros(1, 2, 8))
    TextStep(plan, {0: store}, timeline, Events(), {}).enter(0, inputs)
    assert inputs.mask[0, 0].tolist() == [[True, True, True, False], [True] * 4]


def test_a_joined_step_ranks_anew_the_rows_whose_time_it_is() -> None:
    own = [sequence(WHOLE, 6, visual=4) for _ in range(2)]
    for steps, one in enumerate(own):
        one.rerank, one.steps = 2, steps  # the second one's next step is its second
    store = JoinedStore(0, own, Timeline())
    store.fill([entries(6, visual=4)] * 2)
    store.timeline.start, store.timeline.tokens = store.length, 1
    before = store.filled.view(store.filled.keys, 0).clone()
    run = JoinedStep(plan_with(Spy("attention"), None), {0: store}, store.timeline, Events())
    inputs = LayerInputs(torch.zeros(2, 1, 8))
    run.enter(0, inputs)
    keys, values = store.append(*pair(2, 1))
    call = call_of(keys, values, 1, inputs.mask)
    found = ((call.query @ keys.transpose(2, 3)) * 2**-0.5).softmax(-1).mean(1)[:, 0]
    run.attend(0, call)
    after = store.filled.view(store.filled.keys, 0)[:, :, :6]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1][:, [*found[1, :4].argsort().tolist(), 4, 5]])


# An image behind an earlier turn ------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
def test_an_image_behind_text_sees_of_it_what_its_window_shows(window: int | None) -> None:
    """One row of the earlier turn is padded; all of it is still stored."""
    spy = Spy("attention")
    plan = replace(plan_of(spy, 1.0, 0.5), windows=(window, None))
    timeline = Timeline(Phase.PREFILL, tokens=8, prompt=8, dense_from=8)
    store = KVStore(0, plan.schedule, timeline, window, keeps_text=True)
    given = torch.ones(2, 8)
    given[0, :2] = 0
    _, first = read_prompt(torch.zeros(2, 8, dtype=torch.bool), given, 0, per_image=False)
    store.receive(*pair(2, 8))
    store.admit(first, None, [(), ()])
    timeline.phase, timeline.start, timeline.tokens, timeline.dense_from = Phase.APPEND, 8, 6, 14
    store.write()
    rows, block = read_prompt(VISUAL.expand(2, -1), None, 0, per_image=False)
    run = Prefill(plan, rows, block, {0: store}, timeline, True, None, Events())
    inputs = LayerInputs(torch.zeros(2, 6, 8))
    run.enter(0, inputs)
    keys, values = store.append(*pair(2, 6))
    run.attend(0, call_of(keys, values, 6, inputs.mask))
    there = torch.arange(8) >= torch.tensor([[2], [0]])
    for q in range(6):
        near = torch.arange(8) > 8 + q - (window or 99)
        assert torch.equal(inputs.mask[:, 0, q, :8], there & near)
        assert inputs.mask[:, 0, q, 8:].tolist() == [[k <= q for k in range(6)]] * 2
        if q == 0:
            scored = spy.views[0].key_valid
            assert torch.equal(scored[:, :8], there & near)
            assert scored[:, 8:].all()
    if window is not None:
        assert store.positions(8).tolist() == [[8, 9, 10, 11, 12, 13]] * 2


# A prompt -----------------------------------------------------------------------------------------


def prompt(plan: Plan, events: Events) -> tuple[Prefill, KVStore]:
    timeline = Timeline(Phase.PREFILL, tokens=6, prompt=6, dense_from=6)
    store = KVStore(0, plan.schedule, timeline)
    read = read_prompt(VISUAL, None, 0, per_image=False)
    return Prefill(plan, *read, {0: store}, timeline, False, None, events), store


def test_a_layer_that_runs_again_tells_of_its_score_once() -> None:
    """Gradient checkpointing runs it in backward."""
    heard: list[int] = []

    class Hears(Observer):
        def scored(self, layer: int, score: Tensor) -> None:
            heard.append(layer)

    events = Events()
    events.add(Hears())
    run, store = prompt(plan_of(Spy("attention"), 1.0, 0.5), events)
    keys, values = pair(1, 6)
    for _ in range(2):
        store.receive(keys, values)
        run.enter(0, LayerInputs(torch.zeros(1, 6, 8)))
        run.attend(0, call_of(keys, values, 6, None))
    assert heard == [0]


def test_parts_of_a_larger_projection_are_copied_in_their_layer() -> None:
    """Not behind the last one: until then each layer would hold its whole projection."""
    score = st3.ST3(score="attention").scorer()
    for whole in (False, True):
        run, store = prompt(plan_of(score, 1.0, anneal=st3.Anneal(tau=4)), Events())
        keys, values = torch.randn(3, 1, 1, 6, 2)[:2] if whole else pair(1, 6)
        store.receive(keys, values)
        run.enter(0, LayerInputs(torch.zeros(1, 6, 8)))
        run.attend(0, call_of(keys, values, 6, None))
        assert (store.buffer is not None) == whole


def test_inputs_of_each_token_are_given_for_those_that_are_left() -> None:
    """As the embeddings that some families hand to each layer."""
    read = read_prompt(VISUAL, None, 0, per_image=False)
    run = Prefill(plan_of(Spy("embeds"), 0.5), *read, None, Timeline(), False, None, Events())
    inputs = LayerInputs(torch.zeros(1, 6, 8), others={"of_each": torch.arange(6)[None]})
    run.enter(0, inputs)
    assert inputs.others["of_each"].tolist() == [[0, 3, 4, 5]]


def test_candidates_see_of_each_image_what_its_own_budget_shows() -> None:
    visual = torch.tensor([[0, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    rows, block = read_prompt(visual, None, 1, per_image=True)
    plan = plan_of(Spy("attention"), 1.0, anneal=st3.Anneal("linear", tau=4, floor=0))
    plan = replace(plan, per_image=True)
    assert [plan.schedule.visible(0, n, 1) for n in rows.images[0]] == [1, 2]
    timeline = Timeline(Phase.PREFILL, tokens=8, prompt=7, dense_from=7)
    store = KVStore(0, plan.schedule, timeline)
    keys, values = pair(1, 8)
    store.receive(keys, values)
    run = Prefill(plan, rows, block, {0: store}, timeline, False, None, Events())
    run.enter(0, LayerInputs(torch.zeros(1, 8, 8)))
    call = call_of(keys, values, 8, None)
    run.attend(0, call)
    assert call.mask[0, 0, -1].tolist() == [True, True, True, False, True, True, True, True]
    assert call.mask[0, 0, -2].tolist() == [True] * 7 + [False]


def test_layers_that_run_again_are_given_the_columns_that_they_had() -> None:
    """Gradient checkpointing runs them from the last to the first, in some versions of transformers
    with their hooks."""
    read = read_prompt(VISUAL, None, 0, per_image=False)
    plan = plan_of(Spy("attention"), 1.0, 0.75, 0.25)
    run = Prefill(plan, *read, None, Timeline(), False, None, Events())
    given = {0: torch.arange(6.0)[None, :, None].expand(1, 6, 8)}
    seen: dict[int, list[float]] = {}
    for layer in (0, 1, 2, 2, 1, 0):
        inputs = LayerInputs(given[layer])
        run.enter(layer, inputs)
        columns = inputs.hidden[0, :, 0].tolist()
        assert seen.setdefault(layer, columns) == columns
        given.setdefault(layer + 1, inputs.hidden)
        run.attend(layer, call_of(*pair(1, len(columns)), len(columns), None))
    assert [len(columns) for columns in seen.values()] == [6, 5, 3]
