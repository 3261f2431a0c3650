"""What cannot be trimmed is refused, with the remedy, and never silently left alone."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import st3
from st3.hf.call import CACHE
from st3.methods.schedule import Schedule
from st3.models import VisualTokens, families
from tests.helpers import ST3, Case, parts
from tests.test_cache import Run
from tests.test_modes import SOLO
from tests.test_turns import RAGGED, words
from tests.zoo import REFUSED, I, T
from tests.zoo.base import text


def refused(match: str) -> Any:
    return pytest.raises(st3.UnsupportedModelError, match=match)


# -- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_trimmable_visual_tokens(name: str) -> None:
    """The reason is named, and untested=True does not help: what would go wrong must not run."""
    make, reason = REFUSED[name]
    model = make()
    with refused(reason):
        st3.trim(model, "st3")
    with refused(reason):
        st3.trim(model, "st3", untested=True)


def test_a_text_model() -> None:
    with refused("not a supported vision-language model") as error:
        st3.trim(LlamaForCausalLM(text(LlamaConfig)))
    assert "untested=True" in str(error.value)
    assert all(family.model_type in str(error.value) for family in families())


def test_something_that_is_no_model() -> None:
    with refused("not a supported vision-language model"):
        st3.trim(torch.nn.Linear(2, 2))


def test_a_model_without_its_head() -> None:
    """AutoModel in place of AutoModelForImageTextToText."""
    with refused("AutoModelForImageTextToText"):
        st3.trim(Case.of("llava").model.model)


# -- settings -----------------------------------------------------------------------------------


def test_chunked_prefill() -> None:
    model = Case.of("llava").model
    model.generation_config.prefill_chunk_size = 8
    with refused("Set prefill_chunk_size to None"):
        st3.trim(model).attach()


def test_chunked_prefill_as_an_argument() -> None:
    """The prompt's chunks, which do not end with its last token, must not pass unnoticed."""
    case = Case.of("llava", SOLO)
    with refused("Set prefill_chunk_size to None"):
        case.generate(ST3, 3, prefill_chunk_size=8)


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa"])
def test_attention_without_a_scoring_version(name: str) -> None:
    model = Case.of("llava").model
    model.config.text_config._attn_implementation = name
    with refused("attn_implementation set to one of sdpa, eager, flash_attention_2"):
        st3.trim(model).attach()
    assert model.config.text_config._attn_implementation == name


def test_flash_attention_with_sliding_windows() -> None:
    model = Case.of("gemma3").model
    model.config.text_config._attn_implementation = "flash_attention_2"
    with refused("attn_implementation='sdpa'"):
        st3.trim(model).attach()


# -- caches -------------------------------------------------------------------------------------


def test_a_static_cache() -> None:
    case = Case.of("llava", SOLO)
    cache = StaticCache(config=case.model.config, max_cache_len=64)
    with refused("leave cache_implementation unset"):
        case.generate(ST3, 3, **{CACHE: cache})
    with refused("leave cache_implementation unset"):
        case.generate(ST3, 3, cache_implementation="static")


def test_an_offloaded_cache() -> None:
    case = Case.of("llava", SOLO)
    cache = DynamicCache(config=case.model.config)
    cache.offloading = True
    with refused("leave cache_implementation unset"):
        case.generate(ST3, 3, **{CACHE: cache})


def test_a_cache_of_another_kind_whose_layers_are_plain() -> None:
    class Own(DynamicCache):
        """May do with its layers what it likes."""

    case = Case.of("llava", SOLO)
    with refused("Own is not supported"):
        case.generate(ST3, 3, **{CACHE: Own(config=case.model.config)})


def test_a_cache_layer_of_another_kind() -> None:
    class Quantized(type(DynamicCache(config=Case.of("llava").model.config).layers[0])):  # type: ignore[misc]
        pass

    case = Case.of("llava", SOLO)
    cache = DynamicCache(config=case.model.config)
    cache.layers[0] = Quantized()
    with refused("Quantized cannot be trimmed") as error:
        case.generate(ST3, 3, **{CACHE: cache})
    assert "cache_implementation" in str(error.value)


def test_a_trimmed_cache_outside_of_the_block() -> None:
    run = Run(Case.of("llava", RAGGED))
    ids = words(2, 1, 1)["input_ids"]
    mask = torch.cat([run.mask, torch.ones_like(ids)], 1)
    with pytest.raises(st3.TrimStateError, match="inside the `with st3"), torch.no_grad():
        run.case.model(input_ids=ids, attention_mask=mask, **{CACHE: run.cache})
    with (
        pytest.raises(st3.TrimStateError, match="inside the `with st3"),
        st3.trim(run.case.model, st3.NoTrim()),
        torch.no_grad(),
    ):
        run.case.model(input_ids=ids, attention_mask=mask, **{CACHE: run.cache})
    run.feed(ids)  # and back inside it goes on


# -- prompts ------------------------------------------------------------------------------------


def test_a_ready_made_4d_mask() -> None:
    case = Case.of("llava", SOLO)
    columns = case.width
    case.batch["attention_mask"] = torch.ones(1, 1, columns, columns).tril().bool()
    with refused("pass the 2D attention_mask"):
        case.prefill(ST3)


def test_padding_in_a_further_turn_of_text() -> None:
    run = Run(Case.of("llava", RAGGED))
    ids = words(2, 3, 1)["input_ids"]
    more = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with (
        pytest.raises(st3.TrimStateError, match="a padded batch cannot be continued"),
        st3.trim(run.case.model, ST3),
        torch.no_grad(),
    ):
        run.case.model(
            input_ids=ids,
            attention_mask=torch.cat([run.mask, more], 1),
            **{CACHE: run.cache},
        )


def test_padding_in_a_further_turn_with_an_image() -> None:
    run = Run(Case.of("llava", RAGGED))
    new = run.case.family.inputs(run.case.model, RAGGED, seed=1)
    mask = torch.cat([run.mask, new.pop("attention_mask")], 1)
    with (
        pytest.raises(st3.TrimStateError, match="a padded batch cannot be continued"),
        st3.trim(run.case.model, ST3),
        torch.no_grad(),
    ):
        run.case.model(**new, attention_mask=mask, **{CACHE: run.cache})


def test_a_further_turn_whose_rows_would_differ_in_length() -> None:
    run = Run(Case.of("pixtral", [SOLO[0], SOLO[0]]))
    new = run.case.family.inputs(run.case.model, [[T(2), I(4, 4), T(3)], [T(7), I(3, 4), T(3)]])
    assert new.pop("attention_mask").all()
    with (
        pytest.raises(st3.TrimStateError, match="rows of equal length: continue"),
        st3.trim(run.case.model, ST3),
        torch.no_grad(),
    ):
        run.case.model(
            **new,
            attention_mask=torch.ones(2, run.case.width + new["input_ids"].shape[1]).long(),
            **{CACHE: run.cache},
        )


def test_a_layer_that_calls_its_attention_some_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of("llava", SOLO)
    attention = parts(case.model)[1][7].self_attn
    with st3.trim(case.model, ST3), torch.no_grad():
        config = copy.deepcopy(attention.config)
        config._attn_implementation = "sdpa"
        monkeypatch.setattr(attention, "config", config)
        with refused(r"decoder layers \[7\] did not call their attention"):
            case.model(**case.batch)


def test_an_image_whose_tokens_are_not_found() -> None:
    """Neither by the model's own question for its placeholders, nor by the id of one."""
    case = Case.of("llava", SOLO)
    inner = case.model.model
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        case.model(**case.batch)
        asked = trimmer.report.kept
        # Somebody else puts the original back.
        inner.get_placeholder_mask = type(inner).get_placeholder_mask.__get__(inner)
        case.model(**case.batch)
        assert trimmer.report.kept == asked
        with (
            patch.object(VisualTokens, "_placeholders", return_value=None),
            refused(r"pass visual_mask to st3.trim\(\)"),
        ):
            case.model(**case.batch)


# -- arguments ----------------------------------------------------------------------------------


def test_unknown_policies() -> None:
    with pytest.raises(ValueError, match=r"use one of .*fastv.*st3"):
        st3.trim(Case.of("llava").model, "st4")


def test_policies_that_do_not_fit_the_model() -> None:
    with pytest.raises(ValueError, match="use at most 7"):
        st3.trim(Case.of("llava").model, "fastv:layer=8")


def test_schedules_that_drop_before_the_first_layer() -> None:
    """The score is read off the layer before."""
    policy = st3.PyramidDrop()
    shares = Schedule.from_shares([0.5] * 8)
    with (
        patch.object(st3.PyramidDrop, "schedule", lambda self, layers: shares),
        pytest.raises(ValueError, match="keep all of them in layer 0"),
    ):
        st3.trim(Case.of("llava").model, policy)


def test_per_image_budgets_with_ranking_anew() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        st3.trim(Case.of("llava").model, "st3:stride=2,rerank_every=4", per_image=True)


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="has no argument 'final'"):
        st3.trim(Case.of("llava").model, "st3", final=0.1)
