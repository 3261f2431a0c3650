"""What the ranker is shown, what it shows to a score, and what a pass gives to each layer: on
tensors alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import st3
from st3.engine.calls import AttentionCall, LayerInputs
from st3.engine.events import Events
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Timeline
from st3.engine.plan import Plan
from st3.engine.prefill import Prefill
from st3.engine.prompt import Block, Rows, read_prompt
from st3.engine.ranker import DeferredScore, Ranker
from st3.engine.wiring import Wiring
from st3.methods.schedule import Schedule
from st3.methods.scores import Attention, LayerView, TokenView

VISUAL = torch.tensor([[0, 1, 1, 1, 1, 0]], dtype=torch.bool)


class Spy:
    """A score that notes what it is shown; later tokens rank higher."""

    def __init__(self, stage: str, *needs: str) -> None:
        self.stage, self.needs = stage, needs
        self.views: list[Any] = []

    def __call__(self, view: TokenView | LayerView) -> Tensor:
        self.views.append(view)
        return torch.arange(view.visual.shape[1])[None].float()


def plan_of(score: Any, *shares: float, anneal: st3.Anneal | None = None, **more: Any) -> Plan:
    schedule = Schedule.from_shares(shares, anneal or st3.Anneal("none"))
    windows, wiring = (None,) * len(shares), Wiring(tuple(range(len(shares))))
    return Plan(schedule, score, None, "sdpa", windows, wiring, per_image=False, **more)


def prompt() -> tuple[Rows, Block]:
    return read_prompt(VISUAL, None, 0, per_image=False)


def observe(ranker: Ranker, block: Block, layer: int, past: int, **given: Any) -> tuple[Any, Any]:
    """Attention of a layer behind ``past`` keys of an earlier turn."""
    columns = block.visual.shape[1]
    query, key = torch.randn(1, 2, columns, 4), torch.randn(1, 2, past + columns, 4)
    ranker.observe(layer, block, query, key, None, given, may_defer=True)
    return query, key


def test_scores_of_keys_are_shown_those_of_their_own_columns() -> None:
    spy = Spy("input", "keys")
    rows, block = prompt()
    ranker = Ranker(plan_of(spy, 1.0, 0.5), rows, (False, False), None)
    _, key = observe(ranker, block, 0, past=3)
    ranker.observe_input(1, block, torch.zeros(1, 6, 4))
    assert torch.equal(spy.views[0].keys, key[:, :, 3:])


def test_position_is_taken_off_the_keys_of_the_own_columns() -> None:
    given: list[Any] = []

    def unrotate(query: Tensor, key: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        given.append((query, key, tables))
        return query, key

    spy = Spy("attention", "rotary")
    rows, block = prompt()
    ranker = Ranker(plan_of(spy, 1.0, 0.5, unrotate=unrotate), rows, (False, False), None)
    ranker.entered(torch.zeros(1, 6, 4), "tables")
    query, key = observe(ranker, block, 0, past=3)
    spy.views[0].unrotate()
    assert torch.equal(given[0][0], query)
    assert torch.equal(given[0][1], key[:, :, 3:])
    assert given[0][2] == "tables"


def test_a_score_that_waits_is_the_one_that_would_not_have() -> None:
    """Scaling and softcap are the layer's own."""
    policy = st3.ST3(first_drop=0, final_keep=1, score="attention")
    anneal = st3.Anneal(tau=4)
    rows, block = prompt()
    own = {"scaling": 0.9, "softcap": 0.5}
    found = []
    for may_defer in (True, False):
        torch.manual_seed(0)
        ranker = Ranker(plan_of(policy.scorer(), 1.0, 1.0, anneal=anneal), rows, (True, True), None)
        query, key = 5 * torch.randn(1, 2, 6, 4), 5 * torch.randn(1, 2, 6, 4)
        ranker.observe(0, block, query, key, None, own, may_defer)
        score = ranker.scores[0]
        assert isinstance(score, DeferredScore) == may_defer
        found.append(score.compute(key) if isinstance(score, DeferredScore) else score)
    torch.testing.assert_close(found[0][VISUAL], found[1][VISUAL])


def test_a_layer_that_runs_again_is_not_scored_again() -> None:
    """Gradient checkpointing runs it in backward."""
    spy = Spy("attention")
    rows, block = prompt()
    ranker = Ranker(plan_of(spy, 1.0, 0.5), rows, (False, False), None)
    for _ in range(2):
        observe(ranker, block, 0, past=0)
    assert len(spy.views) == 1


def test_where_all_ranks_wait_no_score_does() -> None:
    """Ranks of a tensor parallel plan exchange scores in the same order."""
    score = st3.ST3(score="attention").scorer()
    anneal = st3.Anneal(tau=4)
    assert plan_of(score, 1.0, 1.0, anneal=anneal).deferrable == (True, True)
    assert plan_of(score, 1.0, 1.0, anneal=anneal, ranks="group").deferrable == (False, False)


def test_a_score_that_a_later_layer_uses_does_not_wait() -> None:
    plan = plan_of(Attention(lazy=2), *[1.0] * 4, 0.5, 0.5, anneal=st3.Anneal(tau=4))
    assert plan.users == {0: [0], 1: [1], 2: [2, 3], 4: [4, 5]}
    assert plan.deferrable == (True, True, False, False, False, False)


def test_the_whole_order_counts_where_tokens_are_annealed() -> None:
    """A score that picks one token after the other may stop at those that the next drop keeps,
    unless more than that is read of its order."""
    wanted = []
    for anneal in (st3.Anneal("none"), st3.Anneal(tau=4)):
        spy = Spy("input")
        rows, block = prompt()
        ranker = Ranker(plan_of(spy, 1.0, 0.5, anneal=anneal), rows, (False, False), None)
        ranker.observe_input(1, block, torch.zeros(1, 6, 4))
        wanted.append(spy.views[0].wanted)
    assert wanted == [2, None]


def test_each_kind_of_layer_keeps_its_own_mask_and_tables() -> None:
    """Gemma 3 has two of both, for full and for sliding layers."""
    rows, block = prompt()
    plan = plan_of(Spy("embeds"), 0.5, 0.5)
    run = Prefill(plan, rows, block, None, Timeline(), False, None, Events())
    hidden = torch.arange(6.0)[None, :, None].expand(1, 6, 4)
    here = [0, 3, 4, 5]
    full = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    near = full & ~full.tril(-2)
    bound = full | VISUAL[:, None, None, :]
    tables = [(torch.randn(1, 6, 4), torch.randn(1, 6, 4)) for _ in range(2)]
    inputs = LayerInputs(hidden, near, tables[0])
    run.enter(0, inputs)
    left = inputs.hidden
    assert left[0, :, 0].tolist() == here
    for mask, own in ((near, tables[0]), (bound, tables[0]), (bound, tables[1])):
        again = LayerInputs(left, mask, own)
        run.enter(1, again)
        assert torch.equal(again.mask, mask[:, :, here][:, :, :, here])
        for given, kept in zip(own, again.tables, strict=True):
            assert torch.equal(kept, given[:, here])


def test_only_a_first_prompt_on_a_cache_is_ordered_for_annealing() -> None:
    rows, block = prompt()
    plan = plan_of(Spy("attention"), 1.0, 1.0, anneal=st3.Anneal(tau=4))
    ordered = [
        Prefill(plan, rows, block, stores, Timeline(), extends, None, Events()).ordered
        for stores, extends in (({}, False), ({}, True), (None, False))
    ]
    assert ordered == [(True, True), (False, False), (False, False)]


def test_a_layer_that_has_less_than_the_floor_is_not_ordered() -> None:
    plan = plan_of(Spy("attention"), 1.0, 0.25, anneal=st3.Anneal(tau=4, floor=0.5))
    assert plan.anneals(((4,),)) == (True, False)
    assert plan_of(Spy("attention"), 1.0, 0.25).anneals(((4,),)) == (False, False)


def test_flash_attention_is_given_no_mask_for_candidates() -> None:
    """It takes none per query: there candidates see what the prompt sees."""
    found: list[Any] = []

    def base(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        found.append(mask)
        return query.transpose(1, 2), None

    rows, block = read_prompt(VISUAL, None, 1, per_image=False)
    score = st3.ST3(score="attention").scorer()
    for kind in ("sdpa", "flash"):
        plan = replace(plan_of(score, 1.0, anneal=st3.Anneal(tau=1, floor=0)), kind=kind)
        timeline = Timeline(tokens=6, prompt=5)
        store = KVStore(0, plan.schedule, timeline)
        run = Prefill(plan, rows, block, {0: store}, timeline, False, None, Events())
        query, key, value = torch.randn(3, 1, 2, 6, 4).unbind()
        store.receive(key, value)
        run.enter(0, LayerInputs(torch.zeros(1, 6, 8)))
        run.attend(0, AttentionCall(base, None, query, key, value, None, {}))
    assert found[1] is None
    assert found[0][0, 0, -1].tolist() == [True, False, False, False, True, True]
