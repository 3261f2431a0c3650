"""Calling the trimmed model itself: its options, training, and prompts that come as embeddings."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import st3
from st3.hf.cache import stores_of
from st3.hf.call import cache_of
from tests.helpers import POLICIES, ST3, Case, assert_same, parts
from tests.test_modes import ON_EACH, SOLO
from tests.zoo import T

STATIC = POLICIES["st3_static"]


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_early", "fastv", "vtw"])
def test_right_padding(name: str, policy: str) -> None:
    Case.of(name, padding="right").check_prefill(POLICIES[policy])


@ON_EACH
def test_padding_on_both_sides_and_within(name: str) -> None:
    """Only the mask says where a row's tokens are."""
    case = Case.of(name)
    case.batch["attention_mask"][:, -1] = 0
    case.batch["attention_mask"][1, -4] = 0
    case.visual = case.visual & case.valid
    case.check_prefill(ST3)


@ON_EACH
def test_without_a_cache(name: str) -> None:
    case = Case.of(name)
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        cached = case.model(**case.batch)
        plain = case.model(**case.batch, use_cache=False)
    assert cache_of(plain) is None
    assert cache_of(cached).get_seq_length() == case.width
    assert len(stores_of(cache_of(cached))) == case.layers
    assert torch.equal(plain.logits, cached.logits)
    assert trimmer.report.samples == []


@ON_EACH
def test_tuple_outputs(name: str) -> None:
    case = Case.of(name)
    with st3.trim(case.model, ST3), torch.no_grad():
        named = case.model(**case.batch)
        plain = case.model(**case.batch, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.logits)


@ON_EACH
def test_hidden_states_have_the_columns_that_are_left(name: str) -> None:
    case = Case.of(name, SOLO)
    schedule, n_visual = case.schedule(ST3), int(case.visual.sum())
    with st3.trim(case.model, ST3), torch.no_grad():
        plain = case.model(**case.batch)
        out = case.model(**case.batch, output_hidden_states=True)
    assert torch.equal(out.logits, plain.logits)
    widths = [state.shape[1] for state in out.hidden_states]
    n_text = case.width - n_visual
    # Entry i is what leaves layer i - 1; the last one is what logits are made of.
    through = [n_text + schedule.kept(layer, n_visual) for layer in range(case.layers)]
    assert widths[1 : case.layers] == through[: case.layers - 1]


@ON_EACH
@pytest.mark.parametrize("keep", [0, 1, 3, [0, 2, -1]], ids=str)
def test_logits_to_keep(name: str, keep: Any) -> None:
    case = Case.of(name)
    with st3.trim(case.model, ST3), torch.no_grad():
        whole = case.model(**case.batch).logits
        wanted = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        given = keep if isinstance(keep, int) else torch.tensor(keep) % case.width
        some = case.model(**case.batch, logits_to_keep=given).logits
    assert_same(some, wanted)


def test_several_logits_of_one_prompt_are_those_of_the_whole() -> None:
    """Without a cache there are no candidates behind the prompt."""
    case = Case.of("llava", SOLO)
    with st3.trim(case.model, ST3), torch.no_grad():
        whole = case.model(**case.batch, use_cache=False).logits
        some = case.model(**case.batch, use_cache=False, logits_to_keep=3).logits
    assert_same(some, whole[:, -3:])


def labels_of(case: Case) -> Tensor:
    """The last three tokens of each row are the answer."""
    labels = torch.full_like(case.batch["input_ids"], -100)
    for row, valid in enumerate(case.valid):
        answer = valid.nonzero().flatten()[-3:]
        labels[row, answer] = case.batch["input_ids"][row, answer]
    return labels


@ON_EACH
@pytest.mark.parametrize("padding", ["left", "right"])
def test_loss_is_that_of_the_kept_tokens(name: str, padding: str) -> None:
    case = Case.of(name, padding=padding)
    labels = labels_of(case)
    with st3.trim(case.model, STATIC), torch.no_grad():
        loss = case.model(**case.batch, labels=labels).loss
    logits = case.reference_prefill(STATIC).logits
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_same(loss, wanted)


def gradients(case: Case, policy: st3.Policy, checkpointing: bool | None) -> dict[str, Tensor]:
    """Gradients of the loss; ``checkpointing`` says whether it is reentrant, None is without."""
    model = copy.deepcopy(case.model).train()
    if checkpointing is not None:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.23 on
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with st3.trim(model, policy):
        model(**case.batch, labels=labels_of(case)).loss.backward()
    return {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


@ON_EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    case = Case.of(name)
    plain = gradients(case, ST3, None)
    again = gradients(case, ST3, reentrant)
    assert len(plain) > 50
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, msg=key)


def test_gradients_are_those_of_the_kept_tokens() -> None:
    """Backward through the reference, whose dropped tokens are only hidden."""
    from tests import reference

    case = Case.of("llava")
    fast = gradients(case, STATIC, None)
    now = reference._new_pass(case.batch, case.schedule(STATIC), case.visual, None, None)
    with reference._running(case.model, now):
        case.model(**case.batch, labels=labels_of(case), use_cache=False).loss.backward()
    slow = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    assert fast.keys() == slow.keys()
    for key, gradient in slow.items():
        assert gradient is not None
        assert_same(fast[key], gradient)


# -- prompts that come as embeddings ------------------------------------------------------------


def merged(case: Case) -> Tensor:
    """The embeddings that go into the text model, image features included."""
    seen: list[Tensor] = []
    text, _ = parts(case.model)
    hook = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        case.model(**case.batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "mistral3", "smolvlm"])
def test_text_embeddings_with_pixels(name: str) -> None:
    case = Case.of(name)
    ids = case.batch.pop("input_ids")
    with torch.no_grad():
        case.batch["inputs_embeds"] = case.model.get_input_embeddings()(ids)
    case.check_prefill(ST3)


@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm"])
def test_ready_embeddings_with_a_visual_mask(name: str) -> None:
    case = Case.of(name)
    embeds = merged(case)
    wanted, _ = case.prefill(ST3)
    given = {"inputs_embeds": embeds, "attention_mask": case.batch["attention_mask"]}
    if "token_type_ids" in case.batch:
        given["token_type_ids"] = case.batch["token_type_ids"]
    with st3.trim(case.model, ST3, visual_mask=case.visual), torch.no_grad():
        logits = case.model(**given).logits
    assert_same(logits[case.valid], wanted[case.valid])


def test_generate_from_ready_embeddings_with_a_visual_mask() -> None:
    case = Case.of("llava")
    embeds, mask = merged(case), case.batch["attention_mask"]
    with st3.trim(case.model, ST3, visual_mask=case.visual), torch.no_grad():
        ids = case.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=8, do_sample=False
        )
    assert torch.equal(ids, case.reference_generate(ST3, 8)[0])


@pytest.mark.filterwarnings("error:st3 trims nothing")
def test_arguments_given_by_position() -> None:
    case = Case.of("llava")
    named, _ = case.prefill(ST3)
    with st3.trim(case.model, ST3), torch.no_grad():
        ids, pixels = case.batch["input_ids"], case.batch["pixel_values"]
        logits = case.model(ids, pixels, case.batch["attention_mask"]).logits
    assert torch.equal(logits, named)


def test_ready_embeddings_without_a_visual_mask_are_not_trimmed_and_warned_of() -> None:
    case = Case.of("llava")
    embeds, mask = merged(case), case.batch["attention_mask"]
    with torch.no_grad():
        bare = case.model(inputs_embeds=embeds, attention_mask=mask).logits
        with st3.trim(case.model, ST3), pytest.warns(UserWarning, match="Pass visual_mask"):
            untouched = case.model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(untouched, bare)


def test_no_warning_for_prompts_of_ids() -> None:
    case = Case.of("llava")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.generate(ST3, 3)
        Case.of("llava", [[T(4)]]).generate(ST3, 3)
