"""Layers with a sliding window evict what no later token sees, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import st3
from st3.engine.kv.base import Store
from st3.engine.kv.store import KVStore
from st3.hf.cache import stores_of
from st3.hf.call import CACHE
from tests.helpers import POLICIES, ST3, Case, answer, assert_same
from tests.test_cache import Run
from tests.test_serve_batch import company
from tests.test_turns import words
from tests.zoo import I, T

NAMES = ["gemma3", "mistral3_window"]
ON_EACH = pytest.mark.parametrize("name", NAMES)
# Windows are 16 tokens: the first row's text reaches far behind, on both sides of the image.
LONG: list[list[Any]] = [[T(21), I(), T(30)], [T(2), I(), T(40)]]
ALONE: list[list[Any]] = [[T(21), I(), T(30)]]
SLACK = 16 + 4  # what a buffer's spare columns hold between two clearings


def slid(cache: Any) -> list[Store]:
    return [store for store in stores_of(cache).values() if store.window is not None]


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "fastv", "random", "none"])
def test_long_answers_to_long_prompts_are_the_references(name: str, policy: str) -> None:
    """Text is evicted when the prompt is written, and several times while the answer grows."""
    case = Case.of(name, LONG)
    chosen = POLICIES[policy]
    out = case.generate(chosen, 70, own_cache=True)
    tokens, logits = case.reference_generate(chosen, 70)
    assert_same(torch.stack(out.logits, 1), logits)
    assert torch.equal(answer(out, case.width), tokens)


@ON_EACH
def test_what_a_layer_holds_is_bounded_by_its_window(name: str) -> None:
    case = Case.of(name, LONG)
    run, text = Run(case), int((case.valid & ~case.visual).sum(1).max())
    for step in range(80):
        run.feed(words(2, 1, step)["input_ids"])
        for layer in slid(run.cache):
            assert layer.window == 16
            held = layer.filled.width
            # Row 0 is the fuller one: its visual tokens and the window, and what came since.
            assert held <= max(row.ordered for row in layer.rows) + layer.window + SLACK
            assert layer.filled.capacity <= held + SLACK
        others = [store for store in stores_of(run.cache).values() if store.window is None]
        assert all(store.filled.width > text + step for store in others)


@ON_EACH
def test_less_is_held_than_untrimmed(name: str) -> None:
    """The first layers keep all visual tokens, and are the only ones that may hold more."""
    case = Case.of(name, ALONE)
    bare = DynamicCache(config=case.model.config)
    with torch.no_grad():
        case.model(**case.batch, **{CACHE: bare})
    run = Run(case, st3.FastV(layer=1, drop=0.5))
    run.feed(words(1, 1, 0)["input_ids"])
    for trimmed, whole in zip(
        list(stores_of(run.cache).values())[1:], bare.layers[1:], strict=True
    ):
        assert trimmed.visible_tokens <= whole.keys.shape[2] + 1


def test_a_new_ranking_keeps_all_text() -> None:
    run = Run(Case.of("gemma3", ALONE), st3.ST3(first_drop=0.3, stride=2, rerank_every=4))
    text = run.case.width - int(run.case.visual.sum())
    for step in range(40):
        run.feed(words(1, 1, step)["input_ids"])
    assert all(store.visible_tokens > text + 39 for store in stores_of(run.cache).values())


def test_tokens_cannot_be_taken_back_past_what_is_freed() -> None:
    run = Run(Case.of("gemma3", ALONE))
    for step in range(60):
        run.feed(words(1, 1, step)["input_ids"])
    layer = slid(run.cache)[0]
    assert isinstance(layer, KVStore)
    assert layer.length > layer._evicted_before > run.case.width
    with pytest.raises(st3.TrimStateError, match="has left the sliding window"):
        layer.crop(layer._evicted_before - 1)
    layer.crop(layer._evicted_before)


@pytest.mark.parametrize("policy", ["st3", "fastv"])
def test_rows_that_join(policy: str) -> None:
    """Rows of other ages, of which one has a text longer than the window."""
    both = company("gemma3")
    rows = [[T(21), I(), T(30)], [T(3), I(), T(4)]]
    inputs = [both.family.inputs(both.model, rows, only=i) for i in range(2)]
    both.change([], {0: both.prefilled(0, inputs[0], POLICIES[policy])})
    both.step(9)
    both.change([], {1: both.prefilled(1, inputs[1], POLICIES[policy])})
    both.step(60)
    for i in range(2):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], POLICIES[policy], len(got)))
    windows = [layer for layer in both.batch.layers if layer.window is not None]
    assert all(layer.width <= 16 + 16 + SLACK for layer in windows)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": False}], ids=["beams", "one"])
def test_ways_to_generate(options: dict[str, Any]) -> None:
    case = Case.of("gemma3", ALONE)
    out = case.generate(ST3, 50, **options)
    tokens, _ = case.reference_generate(ST3, 50, **options)
    assert torch.equal(answer(out, case.width), tokens)


@pytest.mark.slow
def test_compiled_steps() -> None:
    case = Case.of("gemma3", LONG)
    plain = case.generate(ST3, 60)
    with st3.trim(case.model, ST3, compile_decode={"backend": "eager"}, decode_bucket=16):
        out = case.generate(None, 60)
    assert_same(torch.stack(out.logits), torch.stack(plain.logits))


def test_assisted_decoding() -> None:
    case = Case.of("gemma3", ALONE)
    plain = case.generate(ST3, 40)
    out = case.generate(ST3, 40, prompt_lookup_num_tokens=3)
    assert torch.equal(out.sequences, plain.sequences)
