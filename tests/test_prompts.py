"""Which prompt is trimmed, and by which row: masks, candidates, calls of the text model itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import st3
from st3.engine.events import Observer, PromptEvent
from st3.hf.call import CACHE
from st3.models import find_parts
from tests.helpers import METHODS, POLICIES, ST3, Case, assert_same
from tests.zoo import FAMILIES, I, T

SOLO: list[list[Any]] = [[T(5), I(), T(9)]]
HALF = st3.FastV(layer=2, drop=0.5)


def embeddings(case: Case) -> torch.Tensor:
    """What the text model is given for the batch."""
    seen: dict[str, Any] = {}
    text: Any = find_parts(case.model).text
    hook = text.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        case.model(**case.batch)
    hook.remove()
    return seen["inputs_embeds"]  # type: ignore[no-any-return]


# -- visual_mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "samples"],
)
def test_a_mask_goes_for_all_copies_of_its_row(name: str, options: dict[str, Any]) -> None:
    case = Case.of(name, SOLO)
    given = {
        "inputs_embeds": embeddings(case),
        "attention_mask": case.batch["attention_mask"],
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with st3.trim(case.model, HALF, visual_mask=case.visual) as trimmer:
            case.model.generate(**given, max_new_tokens=3, **{"do_sample": False, **options})
    copies = options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    assert [row[-1] for row in trimmer.report.kept] == [trimmer.report.n_visual[0] // 2] * copies


def test_each_copy_has_the_mask_of_its_own_row() -> None:
    case = Case.of("llava", [[T(5), I(), T(9)], [T(9), I(), T(5)]])
    given = {"inputs_embeds": embeddings(case), "attention_mask": case.batch["attention_mask"]}
    read: list[torch.Tensor] = []

    class Reads(Observer):
        def prompt(self, event: PromptEvent) -> None:
            read.append(event.block.visual)

    trimmer = st3.trim(case.model, HALF, visual_mask=case.visual)
    with torch.no_grad(), trimmer, trimmer.observe(Reads()):
        case.model.generate(**given, max_new_tokens=2, do_sample=False, num_beams=2)
    assert torch.equal(read[0], case.visual[[0, 0, 1, 1]])


@pytest.mark.parametrize("by", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("wrong", ["longer", "rows"])
def test_a_mask_of_another_prompt_is_refused(by: str, wrong: str) -> None:
    case = Case.of("llava", [SOLO[0], SOLO[0]])
    mask = torch.nn.functional.pad(case.visual, (0, 1)) if wrong == "longer" else None
    mask = case.visual[:1].repeat(3, 1) if mask is None else mask
    given = {"attention_mask": case.batch["attention_mask"]}
    given[by] = embeddings(case) if by == "inputs_embeds" else case.batch["input_ids"]
    with (
        st3.trim(case.model, HALF, visual_mask=mask),
        pytest.raises(ValueError, match="pass the mask of this prompt"),
    ):
        case.model(**given)


# -- calls that are no prompt ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_a_text_model_called_by_itself_meets_no_earlier_prompt(name: str) -> None:
    """Neither of the same length as the prompt with an image before it, nor of another."""
    case = Case.of(name, SOLO)
    text: Any = find_parts(case.model).text
    for length in (case.width, case.width - 3):
        embeds = torch.randn(1, length, text.config.hidden_size)
        with torch.no_grad():
            expected = text(inputs_embeds=embeds).last_hidden_state
            with st3.trim(case.model, ST3):
                case.model(**case.batch)
                found = text(inputs_embeds=embeds).last_hidden_state
        assert torch.equal(found, expected)


def test_a_text_model_called_by_itself_meets_no_earlier_mask() -> None:
    """The padding behind a row of the prompt is not in what follows."""
    case = Case.of("llava", [[T(5), I(), T(4)], [T(3), I(), T(9)]], padding="right")
    text: Any = find_parts(case.model).text
    cache = DynamicCache(config=case.model.config)
    with st3.trim(case.model, ST3), torch.no_grad():
        case.model(**case.batch, **{CACHE: cache})
        text(inputs_embeds=torch.randn(2, 2, text.config.hidden_size), **{CACHE: cache})
    assert cache.get_seq_length() == case.width + 2


def test_what_assisted_decoding_proposed_is_forgotten_behind_it() -> None:
    case = Case.of("llava", SOLO)
    with st3.trim(case.model, ST3), torch.no_grad():
        whole = case.model(**case.batch).logits
        case.generate(None, 8, prompt_lookup_num_tokens=3)
        cache = DynamicCache(config=case.model.config)
        last = case.model(**case.batch, **{CACHE: cache}, logits_to_keep=5).logits
    assert torch.equal(last, whole[:, -5:])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_several_logits_of_a_prompt_are_no_candidates(name: str) -> None:
    """Scoring a continuation asks for the last logits, with a cache of one's own or none."""
    case = Case.of(name, SOLO)
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        whole = case.model(**case.batch).logits
        cache = DynamicCache(config=case.model.config)
        last = case.model(**case.batch, **{CACHE: cache}, logits_to_keep=5).logits
        report = trimmer.report
        bare = case.model(**case.batch, use_cache=False, logits_to_keep=5).logits
    assert_same(last, whole[:, -5:])
    assert_same(bare, whole[:, -5:])
    assert report.n_text == (int((~case.visual).sum()),)


def test_a_text_prompt_leaves_no_earlier_report() -> None:
    case, words = Case.of("llava", SOLO), Case.of("llava", [[T(6)]])
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        case.model(**case.batch)
        first = trimmer.report
        case.model.generate(**words.batch, max_new_tokens=3)
        with pytest.raises(st3.TrimStateError, match="the latest prompt had no image"):
            _ = trimmer.report
    assert first.steps == 0


# -- without a cache -------------------------------------------------------------------------------


def _warnings(policy: st3.Policy, use_cache: bool) -> list[str]:
    case = Case.of("llava", SOLO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.generate(policy, 3, use_cache=use_cache)
    return [str(w.message) for w in caught if str(w.message).startswith("st3")]


def test_generating_without_a_cache_says_what_is_lost() -> None:
    (said,) = _warnings(ST3, use_cache=False)
    assert "leave use_cache at True" in said
    assert _warnings(ST3, use_cache=True) == []
    assert _warnings(POLICIES["none"], use_cache=False) == []


# -- other caches ----------------------------------------------------------------------------------

STATIC = ["llava", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"]


@pytest.mark.parametrize("name", [name for name in STATIC if name in FAMILIES])
def test_a_static_cache_is_refused_by_its_name(name: str) -> None:
    case = Case.of(name, SOLO)
    try:
        case.generate(None, 3, cache_implementation="static")
    except IndexError:
        pytest.skip("this transformers' own model fails with a static cache")
    with pytest.raises(st3.UnsupportedModelError, match=r"StaticCache|StaticLayer|Static"):
        case.generate(HALF, 3, cache_implementation="static")


# -- what one row or prompt says to another --------------------------------------------------------


def alone_and_beside(name: str, rows: list[list[Any]], policy: st3.Policy, **options: Any) -> Any:
    """The logits behind row 0, by itself and in the batch."""
    beside, alone = Case.of(name, rows), Case.of(name, rows, only=0)
    last = beside.valid[0].nonzero().max()
    return alone.prefill(policy, **options)[0][0, -1], beside.prefill(policy, **options)[0][0, last]


@pytest.mark.parametrize("policy", ["thirds", "grid", "default"])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("llava", [[T(5), I(), T(4)], [T(9), I()]]),
        ("llava_next", [[T(5), I(), I(), T(4)], [T(9), I(), I()]]),
    ],
)
def test_a_row_that_ends_in_an_image_changes_no_other_row(
    name: str, rows: list[list[Any]], policy: str
) -> None:
    """Its very last token is not dropped, but counts where an image's grid is looked for."""
    alone, beside = alone_and_beside(name, rows, (POLICIES | METHODS)[policy])
    assert_same(beside, alone)


@pytest.mark.parametrize("policy", ["st3", "divprune"])
def test_touching_images_at_a_rows_end_keep_budgets_of_their_own(policy: str) -> None:
    rows = [[T(5), I(), I(), T(4)], [T(9), I(), I()]]
    chosen = (POLICIES | METHODS)[policy]
    alone, beside = alone_and_beside("llava", rows, chosen, per_image=True)
    assert_same(beside, alone)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_an_image_encoded_by_itself_is_not_the_next_prompts(name: str) -> None:
    case, policy = Case.of(name, SOLO), METHODS["grid"]
    pixels = {
        key: value
        for key, value in case.batch.items()
        if key.startswith(("pixel", "image_grid", "image_sizes"))
    }
    with torch.no_grad(), st3.trim(case.model, policy):
        before = case.model(**case.batch).logits
        case.model.model.get_image_features(**pixels)
        assert torch.equal(case.model(**case.batch).logits, before)
