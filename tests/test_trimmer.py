"""Attaching and detaching: what a policy that drops nothing, other models and a model after its
trimming show of it is nothing at all."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import st3
from st3.hf.call import cache_of
from tests.helpers import POLICIES, ST3, Case, parts
from tests.test_modes import ON_EACH
from tests.test_reference import MAIN

NOTHING = {
    "none": st3.NoTrim(),
    "st3": st3.ST3(first_drop=0, ratio=0, anneal=st3.Anneal("none")),
    "fastv": st3.FastV(drop=0),
}


def traces(model: nn.Module) -> dict[str, Any]:
    """All that can be hung on a module: attributes of the instance, hooks, attention names."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {k: str(v) for k, v in module.__dict__.items() if "_hooks" in k and v}
        config = getattr(module, "config", None)
        attention = getattr(config, "_attn_implementation", None)
        found[name] = (sorted(module.__dict__), hooks, attention, type(module).forward)
    return found


def logits(case: Case, policy: st3.Policy | None = None) -> tuple[Tensor, Tensor]:
    """Of the prompt and of a short answer."""
    with torch.no_grad():
        if policy is None:
            prompt = case.model(**case.batch).logits
        else:
            prompt, _ = case.prefill(policy)
    return prompt, torch.stack(case.generate(policy, 4).logits)


def assert_identical(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MAIN)
def test_nothing_is_left_after_exit(name: str) -> None:
    case = Case.of(name)
    bare, before = logits(case), traces(case.model)
    with st3.trim(case.model, ST3):
        during = traces(case.model)
        case.generate(None, 3)
    assert during != before
    assert traces(case.model) == before
    for module in case.model.modules():
        assert not [key for key in module.__dict__ if key.startswith("_st3")]
        assert "get_placeholder_mask" not in module.__dict__
        assert "_deepstack_process" not in module.__dict__
    assert_identical(logits(case), bare)


@pytest.mark.parametrize("name", MAIN)
def test_a_policy_that_drops_nothing_changes_no_bit(name: str) -> None:
    case = Case.of(name)
    bare = logits(case)
    assert_identical(logits(case, NOTHING["none"]), bare)


@ON_EACH
@pytest.mark.parametrize("policy", NOTHING)
def test_schedules_that_drop_nothing_change_no_bit(name: str, policy: str) -> None:
    case = Case.of(name)
    bare = logits(case)
    assert_identical(logits(case, NOTHING[policy]), bare)
    torch.manual_seed(1)
    sampled = case.generate(None, 4, do_sample=True)
    torch.manual_seed(1)
    again = case.generate(NOTHING[policy], 4, do_sample=True)
    assert torch.equal(sampled.sequences, again.sequences)


def test_a_trimmer_that_only_watches_leaves_layers_alone() -> None:
    case = Case.of("llava")
    _, layers = parts(case.model)
    with st3.trim(case.model, st3.NoTrim()):
        assert not any(layer._forward_pre_hooks for layer in layers)
        assert case.model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shared", [False, True], ids=["own config", "one config"])
def test_another_model_is_not_affected(shared: bool) -> None:
    case, other = Case.of("llava"), Case.of("llava", seed=1)
    if shared:
        other.model = type(case.model)(case.model.config).eval()
        other.model.generation_config = copy.deepcopy(case.model.generation_config)
    bare = logits(other)
    text, _ = parts(other.model)
    before = traces(other.model) if not shared else None
    with st3.trim(case.model, ST3):
        case.generate(None, 3)
        assert_identical(logits(other), bare)
        if before is not None:
            assert traces(other.model) == before
    assert_identical(logits(other), bare)
    assert text.config._attn_implementation == "sdpa"


def test_two_models_trimmed_at_once() -> None:
    one, other = Case.of("llava"), Case.of("qwen2_5_vl")
    alone = logits(one, ST3), logits(other, POLICIES["fastv"])
    with st3.trim(one.model, ST3), st3.trim(other.model, POLICIES["fastv"]):
        assert_identical((torch.stack(one.generate(None, 4).logits),), alone[0][1:])
        assert_identical((torch.stack(other.generate(None, 4).logits),), alone[1][1:])
        assert_identical((torch.stack(one.generate(None, 4).logits),), alone[0][1:])


def test_the_inner_of_two_policies_wins_and_the_outer_comes_back() -> None:
    case = Case.of("llava")
    bare, before = logits(case), traces(case.model)
    outer, inner = logits(case, ST3), logits(case, POLICIES["vtw"])
    with st3.trim(case.model, ST3) as first:
        within = traces(case.model)
        with st3.trim(case.model, POLICIES["vtw"]) as second:
            assert_identical(logits(case), inner)
            assert second.report.policy.startswith("vtw")
        assert_identical(logits(case), outer)
        assert first.report.policy.startswith("st3")
        with st3.trim(case.model, st3.NoTrim()):
            assert_identical(logits(case), bare)
        assert traces(case.model).keys() == within.keys()
    assert traces(case.model) == before
    assert_identical(logits(case), bare)


def test_a_trimmer_can_be_attached_again_and_again() -> None:
    case = Case.of("llava")
    bare, before, trimmed = logits(case), traces(case.model), logits(case, ST3)
    trimmer = st3.trim(case.model, ST3)
    for _ in range(3):
        assert trimmer.attach() is trimmer
        assert trimmer.attached
        assert_identical(logits(case), trimmed)
        trimmer.detach()
        trimmer.detach()  # once more does nothing
        assert not trimmer.attached
        assert_identical(logits(case), bare)
    assert traces(case.model) == before


def test_a_trimmer_says_in_one_line_what_it_is() -> None:
    case = Case.of(MAIN[0])
    name = type(case.model).__name__
    trimmer = st3.trim(case.model, "fastv:layer=2,drop=0.75")
    assert repr(trimmer) == f"<Trimmer of {name}: fastv:drop=0.75, not attached>"
    with trimmer:
        assert repr(trimmer) == f"<Trimmer of {name}: fastv:drop=0.75, attached>"
    assert "not attached" in repr(trimmer)


def test_a_trimmer_cannot_be_attached_twice() -> None:
    case = Case.of("llava")
    trimmed = logits(case, ST3)
    with st3.trim(case.model, ST3) as trimmer:
        with pytest.raises(st3.TrimStateError, match=r"detach\(\) it first"):
            trimmer.attach()
        assert_identical(logits(case), trimmed)


def test_trimmers_are_detached_in_reverse_order() -> None:
    case = Case.of("llava")
    before = traces(case.model)
    outer, inner = st3.trim(case.model, ST3).attach(), st3.trim(case.model, "vtw").attach()
    with pytest.raises(st3.TrimStateError, match="on top of this one: detach it first"):
        outer.detach()
    with pytest.raises(st3.TrimStateError, match=r"detach\(\) it first"):
        outer.attach()
    inner.detach()
    outer.detach()
    assert traces(case.model) == before


@pytest.mark.parametrize("layer", [0, 3, 7])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_an_error_in_a_layer_leaves_nothing_behind(name: str, layer: int) -> None:
    case = Case.of(name)
    bare, before, trimmed = logits(case), traces(case.model), logits(case, ST3)

    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    with st3.trim(case.model, ST3):
        hook = parts(case.model)[1][layer].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            case.generate(None, 3)
        hook.remove()
        assert_identical(logits(case), trimmed)  # the next run starts anew
    assert traces(case.model) == before
    assert_identical(logits(case), bare)


def test_an_error_while_attaching_leaves_nothing_behind() -> None:
    case = Case.of("llava")
    before, trimmed = traces(case.model), logits(case, ST3)
    with st3.trim(case.model, ST3):
        case.model.generation_config.prefill_chunk_size = 8
        with pytest.raises(st3.UnsupportedModelError):
            st3.trim(case.model, "fastv").attach()
        case.model.generation_config.prefill_chunk_size = None
        assert_identical(logits(case), trimmed)  # the outer one goes on
    assert traces(case.model) == before


def test_what_was_trimmed_is_let_go() -> None:
    case = Case.of("llava")
    with st3.trim(case.model, ST3) as trimmer:
        out = case.generate(None, 3)
        cache = weakref.ref(cache_of(out))
    del out
    gc.collect()
    assert cache() is None
    report, model = trimmer.report, weakref.ref(case.model)
    del case, trimmer
    gc.collect()
    assert model() is None
    assert report.steps == 2


def test_a_report_needs_a_run() -> None:
    with pytest.raises(st3.TrimStateError, match="run the model on a prompt with an image"):
        _ = st3.trim(Case.of("llava").model).report


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_forward_of_the_instances_own_stays(name: str) -> None:
    """As accelerate gives one to models on several devices."""
    case = Case.of(name)
    text, _ = parts(case.model)
    calls: list[int] = []
    original = text.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    text.forward = forward
    before = traces(case.model)
    with st3.trim(case.model, ST3):
        case.generate(None, 3)
    assert traces(case.model) == before
    assert text.forward is forward
    assert len(calls) == 3
