"""The trimmed KV cache: what is live, what is freed, and all that generate() and users do to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

import st3
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Phase, Timeline
from st3.engine.prompt import read_prompt
from st3.hf.cache import stores_of
from st3.hf.call import CACHE, cache_of
from st3.methods.schedule import Schedule
from st3.methods.scores import Attention
from tests import reference
from tests.conversation import Conversation
from tests.helpers import ANNEAL, POLICIES, ST3, Case, answer, assert_same
from tests.test_modes import ON_EACH, SOLO
from tests.test_turns import RAGGED, positions, words
from tests.zoo import I, T


class Each(BaseStreamer):
    """Calls back after each token."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def put(self, value: Tensor) -> None:
        self.call()

    def end(self) -> None:
        pass


class Run:
    """A trimmed model fed token by token."""

    def __init__(self, case: Case, policy: st3.Policy = ST3) -> None:
        self.case, self.policy = case, policy
        self.trimmer = st3.trim(case.model, policy)
        self.cache: Cache = DynamicCache(config=case.model.config)
        self.mask = case.batch["attention_mask"]
        self.logits = self._run(case.batch)

    @torch.no_grad()
    def _run(self, inputs: dict[str, Any]) -> Tensor:
        with self.trimmer:
            return self.case.model(
                **{**inputs, "attention_mask": self.mask}, **{CACHE: self.cache}
            ).logits

    def feed(self, ids: Tensor) -> Tensor:
        """Logits of the last token."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        return self._run(self.inputs(ids))[:, -1]

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """What forward() needs for further tokens."""
        return {
            "input_ids": ids,
            "attention_mask": self.mask,
            **positions(self.case, self.mask, ids),
        }

    def slow(self, ids: Tensor) -> Tensor:
        """The slow reference's logits of the last token, fed with the prompt and then these ids,
        one by one."""
        talk = Conversation(self.case.model, self.case.schedule(self.policy))
        logits = talk.chunk(self.case.batch, self.case.visual)
        mask = self.case.batch["attention_mask"]
        for column in ids.T:
            mask = torch.cat([mask, torch.ones_like(column[:, None])], 1)
            logits = talk.chunk({"input_ids": column[:, None], "attention_mask": mask})
        return logits[:, -1]


@ON_EACH
def test_lengths_are_those_of_the_untrimmed_model(name: str) -> None:
    run = Run(Case.of(name, RAGGED))
    for step in range(5):
        lengths = {layer.get_seq_length() for layer in run.cache.layers}
        assert lengths == {run.case.width + step} == {run.cache.get_seq_length()}
        run.feed(words(2, 1, step)["input_ids"])


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_early", "vtw", "fastv"])
def test_live_entries_are_those_that_the_schedule_leaves(name: str, policy: str) -> None:
    """At every step and in every layer the live keys of a row are one run up to the end, and
    exactly the untrimmed cache's keys of the tokens that the reference shows."""
    case = Case.of(name, RAGGED)
    chosen = POLICIES[policy]
    if isinstance(chosen, st3.ST3):
        chosen = replace(chosen, score="attention")  # what the bare reference ranks by
    run = Run(case, chosen)
    now = reference._new_pass(case.batch, case.schedule(run.policy), case.visual, None, None)
    full = reference.full_cache(case.model)
    with reference._running(case.model, now), torch.no_grad():
        case.model(**case.batch, **{CACHE: full})
    for step in range(1, 6):
        token = words(2, 1, step)["input_ids"]
        run.feed(token)
        with reference._running(case.model, now), torch.no_grad():
            case.model(**run.inputs(token), **{CACHE: full})
        for index, slow in enumerate(full.layers):
            layer, fast = run.cache.layers[index], stores_of(run.cache)[index]
            shown = now.decode(index, step) & case.valid
            if fast.window is not None:  # what stands in its order and is seen by no later token
                assert case.width > fast.window
                near = torch.arange(case.width) > case.width - fast.window
                shown &= near | case.visual if any(row.ordered for row in fast.rows) else near
            shown = torch.nn.functional.pad(shown, (0, step), value=True)
            starts = fast.row_starts(step)
            for row in range(2):
                live = layer.keys[row, :, starts[row] - fast.first_visible() :]
                wanted = slow.keys[row, :, : shown.shape[1]][:, shown[row]]
                assert live.shape == wanted.shape
                torch.testing.assert_close(in_order(live), in_order(wanted), rtol=1e-4, atol=1e-4)
                assert torch.equal(live, layer.keys[row, :, layer.keys.shape[2] - live.shape[1] :])


def in_order(keys: Tensor) -> Tensor:
    """[heads, K, size], sorted by the first number of each key."""
    return keys[:, keys[0, :, 0].argsort()]


@ON_EACH
def test_own_cache_without_trimming_is_the_bare_model(name: str) -> None:
    case = Case.of(name)
    bare = case.generate(None, 8)
    own = case.generate(st3.NoTrim(), 8, own_cache=True)
    assert torch.equal(own.sequences, bare.sequences)
    assert_same(torch.stack(own.logits), torch.stack(bare.logits))
    kinds = {type(layer).__name__ for layer in cache_of(own).layers}
    assert kinds == {"TrimmedLayer"}


# -- rolling back and copying -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("relative", [True, False], ids=["crop(-4)", "crop(length)"])
def test_crop_then_another_continuation(name: str, relative: bool) -> None:
    run = Run(Case.of(name, RAGGED))
    ids, other = words(2, 6, 1)["input_ids"], words(2, 3, 2)["input_ids"]
    for column in ids.T:
        run.feed(column[:, None])
    # transformers gives either.
    run.cache.crop(torch.tensor(-4) if relative else run.case.width + 2)
    assert type(stores_of(run.cache)[0].length) is int
    run.mask = run.mask[:, :-4]
    assert run.cache.get_seq_length() == run.case.width + 2
    assert stores_of(run.cache)[0].timeline.steps == 2
    for column in other.T:
        last = run.feed(column[:, None])
    assert_same(last, run.slow(torch.cat([ids[:, :2], other], 1)))


def test_crop_into_a_trimmed_prompt_is_refused() -> None:
    run = Run(Case.of("llava", RAGGED))
    run.feed(words(2, 1, 1)["input_ids"])
    with pytest.raises(st3.TrimStateError, match="Start again from the whole prompt"):
        run.cache.crop(-2)


def test_crop_into_a_later_prompt_is_refused() -> None:
    run = Run(Case.of("llava", SOLO))
    later = run.case.family.inputs(run.case.model, [[T(2), I(), T(3)]], seed=1)
    run.mask = torch.cat([run.mask, later["attention_mask"]], 1)
    run._run(later)
    run.feed(words(1, 1, 1)["input_ids"])
    run.cache.crop(-1)
    with pytest.raises(st3.TrimStateError, match="Start again from the whole prompt"):
        run.cache.crop(-1)


def test_crop_past_a_compaction_is_refused() -> None:
    run = Run(Case.of("llava", RAGGED))
    for step in range(8):
        run.feed(words(2, 1, step)["input_ids"])
    run.trimmer.compact()
    run.cache.crop(-1 if ANNEAL.factor(7) == ANNEAL.factor(8) else 0)
    with pytest.raises(st3.TrimStateError, match="cannot crop past a compaction"):
        run.cache.crop(-6)


def test_copies_of_a_cache_go_on_by_themselves() -> None:
    run = Run(Case.of("llava", RAGGED))
    start = words(2, 2, 1)["input_ids"]
    for column in start.T:
        run.feed(column[:, None])
    memo: dict[int, Any] = {}
    twin = copy.copy(run)
    twin.cache = copy.deepcopy(run.cache, memo)
    assert not any(isinstance(thing, nn.Module) for thing in memo.values())
    one, other = words(2, 4, 2)["input_ids"], words(2, 3, 3)["input_ids"]
    for a, b in zip(one.T[:3], other.T, strict=True):  # in turns
        run.feed(a[:, None])
        last = twin.feed(b[:, None])
    assert_same(last, run.slow(torch.cat([start, other], 1)))
    assert_same(run.feed(one[:, 3:]), run.slow(torch.cat([start, one], 1)))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_rows_can_be_repeated_and_chosen(name: str) -> None:
    case = Case.of(name, [[T(5), I(), T(4)], [T(3), I(), T(9)], [T(7)]])
    run = Run(case)
    ids = words(3, 2, 1)["input_ids"]
    for column in ids.T:
        run.feed(column[:, None])
    run.cache.batch_repeat_interleave(2)
    chosen = torch.tensor([5, 0, 2, 3])
    run.cache.batch_select_indices(chosen)
    order = torch.tensor([3, 0, 1, 2])
    run.cache.reorder_cache(order)
    rows = (chosen // 2)[order]
    run.mask = run.mask[rows]
    new = words(3, 1, 2)["input_ids"]
    assert_same(run.feed(new[rows]), run.slow(torch.cat([ids, new], 1))[rows])


def test_a_cache_that_was_reset_takes_another_prompt_and_another_policy() -> None:
    case, other = Case.of("llava", RAGGED), Case.of("llava", SOLO)
    run = Run(case)
    run.feed(words(2, 1, 1)["input_ids"])
    run.cache.reset()
    again = Run.__new__(Run)
    again.case, again.policy = other, POLICIES["st3_early"]
    again.trimmer, again.cache = st3.trim(case.model, again.policy), run.cache
    other.model = case.model
    again.mask = other.batch["attention_mask"]
    again._run(other.batch)
    ids = words(1, 3, 2)["input_ids"]
    for column in ids.T:
        last = again.feed(column[:, None])
    assert_same(last, again.slow(ids))


@pytest.mark.parametrize("policy", ["st3", "none"])
def test_a_cache_that_was_reset_takes_text(policy: str) -> None:
    run = Run(Case.of("llava", SOLO))
    run.feed(words(1, 1, 1)["input_ids"])
    run.cache.reset()
    ids, bare = words(1, 6, 2)["input_ids"], DynamicCache(config=run.case.model.config)
    run.trimmer = st3.trim(run.case.model, POLICIES[policy])
    run.mask = torch.ones(1, 0, dtype=torch.long)
    for part in (ids[:, :5], ids[:, 5:]):
        with torch.no_grad():
            wanted = run.case.model(input_ids=part, **{CACHE: bare}).logits
        assert_same(run.feed(part), wanted[:, -1])


def test_a_cache_of_ones_own_is_trimmed_in_place() -> None:
    case = Case.of("llava")
    cache = DynamicCache(config=case.model.config)
    out = case.generate(ST3, 4, **{CACHE: cache})
    assert cache_of(out) is cache
    assert torch.equal(answer(out, case.width), answer(case.generate(ST3, 4), case.width))


# -- memory -------------------------------------------------------------------------------------


@ON_EACH
def test_compacting_while_decoding_changes_no_token(name: str) -> None:
    case = Case.of(name)
    plain = case.generate(ST3, 12)
    with st3.trim(case.model, ST3) as trimmer:
        freed: list[int] = []
        compacted = case.generate(None, 12, streamer=Each(lambda: freed.append(trimmer.compact())),
                                  num_beams=1) if len(case.visual) == 1 else None  # fmt: skip
        if compacted is None:  # streaming takes one prompt: compact from a hook of the model
            hook = case.model.register_forward_hook(lambda *args: freed.append(trimmer.compact()))
            compacted = case.generate(None, 12)
            hook.remove()
        report = trimmer.report
    assert_same(torch.stack(compacted.logits), torch.stack(plain.logits))
    assert torch.equal(compacted.sequences, plain.sequences)
    assert sum(freed) > 0
    assert report.kv_allocated_bytes < case_allocated(case)


def case_allocated(case: Case) -> int:
    with st3.trim(case.model, ST3) as trimmer:
        case.generate(None, 12)
        return trimmer.report.kv_allocated_bytes


def test_compact_frees_what_annealing_released() -> None:
    run = Run(Case.of("llava", RAGGED))
    for step in range(12):
        run.feed(words(2, 1, step)["input_ids"])
    before = run.trimmer.report
    allocated, live = before.kv_allocated_bytes, before.kv_live_bytes
    freed = run.trimmer.compact()
    after = run.trimmer.report
    assert freed > 0
    assert after.kv_allocated_bytes == allocated - freed
    assert after.kv_live_bytes == live
    for index, layer in enumerate(run.cache.layers):
        keys = stores_of(run.cache)[index].filled.keys
        assert keys.shape[2] == layer.keys.shape[2]  # not a column more than is visible
        assert keys.untyped_storage().nbytes() == keys.numel() * 4
    assert run.trimmer.compact() == 0


def test_compact_without_a_run_frees_nothing() -> None:
    assert st3.trim(Case.of("llava").model).compact() == 0


def test_a_long_answer_grows_its_buffers() -> None:
    """Beyond the headroom, while entries are being annealed."""
    policy = st3.ST3(first_drop=0.3, stride=2, anneal=st3.Anneal(tau=60, floor=0))
    Case.of("gemma3", RAGGED).check_generate(policy, 80)


# -- when a prompt is written ---------------------------------------------------------------------


def test_a_prompt_is_written_with_the_first_further_token() -> None:
    """Until then nothing is copied, and only drops are scored."""
    run = Run(Case.of("llava", SOLO))
    stores = [store for store in stores_of(run.cache).values() if isinstance(store, KVStore)]
    assert len(stores) == run.case.layers
    assert all(store.pending is not None and store.buffer is None for store in stores)
    assert [s.allocated_tokens for s in stores] == [s.visible_tokens for s in stores]
    held = [store.entry_bytes for store in stores]
    run.feed(words(1, 1, 1)["input_ids"])
    assert all(store.pending is None for store in stores)
    assert [store.entry_bytes for store in stores] == held
    assert all(store.allocated_tokens > store.visible_tokens for store in stores)


def test_scores_that_only_annealing_needs_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    score = Attention.__call__

    def noted(self: Attention, view: Any) -> Tensor:
        taken.append(view.layer)
        return score(self, view)

    monkeypatch.setattr(Attention, "__call__", noted)
    run = Run(Case.of("llava", SOLO))
    schedule = run.case.schedule(run.policy)
    drops = [
        i
        for i in range(1, len(run.cache.layers))
        if schedule.kept(i, 16) < schedule.kept(i - 1, 16)
    ]
    assert taken == [layer - 1 for layer in drops]
    run.feed(words(1, 1, 1)["input_ids"])
    assert set(taken) > {layer - 1 for layer in drops}
    assert len(taken) == len(set(taken))


def test_parts_of_a_larger_projection_are_written_at_once() -> None:
    """Kept as they are, they would keep the queries alive, too."""
    timeline = Timeline(Phase.PREFILL, tokens=5)
    store = KVStore(0, Schedule.from_shares([1]), timeline)
    whole = torch.randn(1, 2, 5, 12)
    rows, block = read_prompt(torch.zeros(1, 5, dtype=torch.bool), None, 0, per_image=False)
    store.receive(whole[..., :4], whole[..., 4:8])
    store.admit(block, None, [rows.n_visual])
    assert store.pending is None
    assert store.buffer is not None
    assert torch.equal(store.buffer.view(store.buffer.keys, 0), whole[..., :4])
