"""Ranking per KV head: each head keeps visual entries of its own, as many as every other; against
the slow reference, which hides them by a mask per head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import st3
from st3.engine import prefill
from st3.engine.candidates import candidates_mask
from st3.engine.kv.layout import copy_columns
from st3.hf.cache import stores_of
from st3.hf.call import CACHE, cache_of
from tests import reference
from tests.helpers import ANNEAL, DEEP, Case, answer, assert_same, images
from tests.test_serve_batch import company
from tests.test_turns import turn, words
from tests.zoo import I, T, build

# Two KV heads of two query heads each; DeepStack and normed queries; a pixel shuffle; one KV head
# for all; a layer that others read.
FAMILIES = ["llava", "qwen3_vl", "internvl", "paligemma", "qwen2_5_vl", "smolvlm"]
EVICT = st3.Evict(layer=1, keep=0.3, per_head=True)
POLICIES: dict[str, st3.Policy] = {
    "evict": EVICT,
    "evict by text rows": st3.Evict(keep=0.4, score="text-rows", per_head=True),
    "evict by mmr": st3.Evict(layer=1, keep=0.3, score="mmr-attention", per_head=True),
    "st3": st3.ST3(**DEEP, anneal=ANNEAL, per_head=True),
    "mixed": st3.Balanced(stride=2, anneal=ANNEAL, per_head=True),
    "largest head": st3.ST3(**DEEP, anneal=ANNEAL, score="attention-max", per_head=True),
    "no rope": st3.ST3(**DEEP, anneal=ANNEAL, score="attention-no-rope", per_head=True),
    "debiased": st3.ST3(**DEEP, anneal=ANNEAL, score="text-rows-debiased", per_head=True),
    "raters": st3.ST3(**DEEP, anneal=ANNEAL, score="text-raters", per_head=True),
    "key norm": st3.Evict(layer=1, keep=0.3, score="key_norm", per_head=True),
    "tower first": st3.ST3(**DEEP, anneal=ANNEAL, score="salient", per_head=True),
}
SEVERAL = [[T(2), I(), T(3), I(), I(), T(4)], [I(), T(6)], [T(3), I(), T(2)]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", ["evict", "mixed"])
def test_families(name: str, policy: str) -> None:
    Case.of(name).check_generate(POLICIES[policy], 10)


@pytest.mark.parametrize("policy", POLICIES)
def test_scores(policy: str) -> None:
    case = Case.of("llava", SEVERAL)
    case.check_prefill(POLICIES[policy])
    case.check_generate(POLICIES[policy], 10)


def test_heads_keep_other_tokens_and_answers_differ() -> None:
    case = Case.of("llava")
    one = case.generate(st3.Evict(layer=1, keep=0.3), 10)
    each = case.generate(EVICT, 10)
    assert torch.equal(one.logits[0], each.logits[0])  # the prefill sees everything
    assert not torch.allclose(one.logits[-1], each.logits[-1])


def test_a_model_of_one_kv_head_has_nothing_to_tell_apart() -> None:
    case = Case.of("paligemma")
    one, each = (case.generate(st3.Evict(keep=0.3, per_head=flag), 6) for flag in (False, True))
    assert torch.equal(torch.stack(one.logits), torch.stack(each.logits))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "seed": 0},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    rows = [[T(5), I(), T(4)]] if "prompt_lookup_num_tokens" in options else None
    for policy in (EVICT, POLICIES["mixed"]):
        Case.of("llava", rows).check_generate(policy, 12, **options)


def test_candidates_in_the_prompts_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assisted decoding may put candidates up with the prompt: they see what their steps see."""
    case = Case.of("llava", [[T(2), I(), T(9)]])
    case.batch["input_ids"][0, -3:] = case.batch["input_ids"][0, -9:-6]
    shapes = []

    def noted(plan: Any, layer: int, block: Any, score: Any, *rest: Any) -> Any:
        shapes.append(tuple(score.shape[:2]))
        return candidates_mask(plan, layer, block, score, *rest)

    monkeypatch.setattr(prefill, "candidates_mask", noted)
    for attention in ("sdpa", "eager"):
        case.model.set_attn_implementation(attention)
        with torch.no_grad():
            out = case.generate(EVICT, 16, prompt_lookup_num_tokens=4)
        ids, logits = case.reference_generate(EVICT, 16)
        assert torch.equal(answer(out, case.width), ids)
        assert_same(torch.stack(out.logits, 1), logits)
    assert set(shapes) == {(1, 2)}


def test_a_budget_for_each_image() -> None:
    case = Case.of("llava", SEVERAL)
    case.check_generate(POLICIES["mixed"], 8, spans=images(case))


@pytest.mark.parametrize("policy", ["evict", "st3"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_further_turn_of_text(name: str, policy: str) -> None:
    case = Case.of(name, [[T(5), I(), T(4)], [T(3), I(), T(9)]])
    new, chosen = words(2, 4, seed=9), POLICIES[policy]
    with st3.trim(case.model, chosen), torch.no_grad():
        first = case.generate(None, 6)
        second = case.model.generate(**turn(case, first, new))
        third = case.model.generate(**turn(case, second, new))
    now = reference._new_pass(
        case.batch, case.schedule(chosen), case.visual, None, None, heads=True
    )
    cache = reference.full_cache(case.model)
    with reference._running(case.model, now), torch.no_grad():
        slow = case.generate(None, 6, **{CACHE: cache})
        for out in (second, third):
            slow = case.model.generate(**turn(case, slow, new))
            assert_same(torch.stack(out.logits), torch.stack(slow.logits))


@pytest.mark.parametrize("policy", [EVICT, POLICIES["st3"]], ids=str)
def test_layers_with_a_state(policy: st3.Policy) -> None:
    """Which have no KV entries: the others keep those of each head. A row of a batch is the row
    alone."""
    family, model = build("qwen3_5")
    rows = [[T(5), I(3, 4), T(4)], [T(3), I(2, 3), T(2), I(3, 4), T(6)]]
    with torch.no_grad(), st3.trim(model, policy):
        whole = model.generate(**family.inputs(model, rows), max_new_tokens=8, do_sample=False)
        for row in range(2):
            inputs = family.inputs(model, rows, only=row)
            alone = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            assert torch.equal(alone[0, -8:], whole[row, -8:])


def test_turns_crops_and_compaction() -> None:
    """Each on top of the other: what a head has hidden stays hidden."""
    case = Case.of("llava", [[T(5), I(), T(4)]])
    more = torch.tensor([[40, 41, 42]])
    with torch.no_grad(), st3.trim(case.model, EVICT) as trimmer:
        out = case.model.generate(**case.batch, max_new_tokens=6, do_sample=False,
                                  return_dict_in_generate=True)  # fmt: skip
        cache = cache_of(out)
        before = trimmer.report.kv_allocated_bytes
        trimmer.compact()
        assert trimmer.report.kv_allocated_bytes < before
        for store in stores_of(cache).values():
            store.check_integrity()
        cache.crop(cache.get_seq_length() - 2)
        ids = torch.cat([out.sequences[:, : cache.get_seq_length()], more], 1)
        case.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
            max_new_tokens=4, do_sample=False,
        )  # fmt: skip


def test_memory_really_shrinks() -> None:
    """As much as without: what is evicted is freed when the buffer grows."""
    case = Case.of("llava", [[T(3), I(), I(), I(), T(6)]])
    bytes_of = []
    for policy in (st3.Evict(keep=0.25, per_head=True), st3.Evict(keep=0.25), st3.NoTrim()):
        with torch.no_grad(), st3.trim(case.model, policy, own_cache=True) as trimmer:
            case.model.generate(**case.batch, max_new_tokens=40, do_sample=False)
            report = trimmer.report
            bytes_of.append((report.kv_live_bytes, report.kv_allocated_bytes))
    assert bytes_of[0] == bytes_of[1]
    assert bytes_of[0][0] < 0.7 * bytes_of[2][0]
    assert bytes_of[0][1] < 0.8 * bytes_of[2][1]


def test_rows_that_join_a_running_batch() -> None:
    both = company("llava")
    family, model = both.family, both.model
    prompts = [[T(5), I(), T(4)], [T(2), I(), T(11)], [T(4), I(), T(2)]]
    inputs = [family.inputs(model, prompts, only=i) for i in range(3)]
    chosen = [EVICT, POLICIES["mixed"], st3.ST3(**DEEP, anneal=ANNEAL, rerank_every=2)]
    for i in range(3):
        both.change([], {i: both.prefilled(i, inputs[i], chosen[i])})
        both.step(3)
    for i in range(3):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], chosen[i], len(got)))


def test_compiled_steps() -> None:
    case = Case.of("llava", [[T(5), I(), T(4)]])
    plain = case.generate(POLICIES["mixed"], 8)
    with (
        torch.no_grad(),
        st3.trim(case.model, POLICIES["mixed"], compile_decode={"backend": "eager"}),
    ):
        out = case.model.generate(**case.batch, max_new_tokens=8, do_sample=False,
                                  output_logits=True, return_dict_in_generate=True)  # fmt: skip
    assert_same(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("size_first", [False, True])
def test_columns_are_copied_head_by_head(size_first: bool) -> None:
    source = torch.randn(2, 5, 3, 4).transpose(1, 2)  # [B, heads, N, size], as projections lie
    order = torch.stack([torch.randperm(5)[:4] for _ in range(6)]).view(2, 3, 4)
    target = torch.empty(2, 3, 4, 4)
    if size_first:
        target = target.transpose(2, 3)
    copy_columns(source, order, target)
    for b in range(2):
        for h in range(3):
            assert torch.equal(target[b, h], source[b, h, order[b, h]])


def test_refusals() -> None:
    model = Case.of("llava").model
    for text, why in (
        ("st3:per_head=true,curve=none", "leave per_head out, or curve=none"),
        ("st3:per_head=true,rerank_every=2", "leave per_head out, or curve=none"),
        ("st3:per_head=true,score=grid", "use one that is, such as score=attention"),
        ("st3:per_head=true,score=attention-lazy2", "use one that is, such as score=attention"),
        ("evict:per_head=true,score=divprune", "use one that is, such as score=attention"),
    ):
        with pytest.raises(ValueError, match=why):
            st3.trim(model, text)
    with pytest.raises(ValueError, match="per_head must be true or false, got 3"):
        st3.Evict(per_head=3)  # type: ignore[arg-type]
    with pytest.raises(st3.UnsupportedModelError, match=r"sliding windows.*leave per_head out"):
        st3.trim(Case.of("gemma3").model, EVICT)
    assert st3.parse("evict:per_head=true,budget=0.5").per_head
    assert str(st3.parse("evict:per_head=true")) == "evict:per_head=true"
