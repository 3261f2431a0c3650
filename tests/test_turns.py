"""Conversations: a further turn of text, and one with a new image, on a trimmed cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import st3
from st3.hf.call import CACHE, cache_of
from tests import reference
from tests.conversation import Conversation
from tests.helpers import POLICIES, ST3, Case, assert_same
from tests.test_modes import ON_EACH, SOLO
from tests.zoo import I, T

RAGGED: list[list[Any]] = [[T(5), I(), T(4)], [T(3), I(), T(9)]]


def words(batch: int, count: int, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(30, 120, (batch, count), generator=rng)}


def positions(case: Case, mask: Tensor, new: Tensor) -> dict[str, Tensor]:
    """What generate() computes for models with 3D positions, whose forward() fails behind a cache
    without: the positions [3, B, Q] of the tokens ``new`` [B, Q] at the end of ``mask``."""
    deltas = getattr(case.model.model, "rope_deltas", None)
    if deltas is None:
        return {}
    place = (mask.cumsum(1) - 1)[:, -new.shape[1] :] + deltas
    return {"position_ids": place.expand(3, -1, -1)}


class Talk:
    """Feeds the same chunks to the trimmed model and to the slow reference."""

    def __init__(self, case: Case, policy: st3.Policy) -> None:
        self.case, self.policy = case, policy
        self.cache = DynamicCache(config=case.model.config)
        self.slow = Conversation(case.model, case.schedule(policy), policy.rerank)
        self.mask = torch.ones(len(case.visual), 0, dtype=torch.long)

    def say(self, chunk: dict[str, Any], visual: Tensor | None = None) -> None:
        """Both give the same logits for the chunk."""
        own = chunk.get("attention_mask", torch.ones_like(chunk["input_ids"]))
        self.mask = torch.cat([self.mask, own], 1)
        inputs = {**chunk, "attention_mask": self.mask}
        if self.cache.get_seq_length():
            inputs.update(positions(self.case, self.mask, own))
        wanted = self.slow.chunk(inputs, visual)
        with st3.trim(self.case.model, self.policy), torch.no_grad():
            logits = self.case.model(**inputs, **{CACHE: self.cache}, use_cache=True).logits
        last = self.slow.gone[self.case.layers - 1] if self.slow.gone else ~self.mask.bool()
        there = (own.bool() & ~last[:, -own.shape[1] :]) if self.slow.gone else own.bool()
        assert_same(logits[there], wanted[there])
        assert self.cache.get_seq_length() == self.mask.shape[1]

    def say_words(self, *counts: int) -> None:
        for count in counts:
            self.say(words(len(self.mask), count, seed=self.mask.shape[1]))

    def show(self, seed: int, rows: list[list[Any]]) -> None:
        """A chunk with one more image in each row."""
        family, model = self.case.family, self.case.model
        batch = family.inputs(model, rows, seed=seed)
        batch.pop("mm_token_type_ids", None)  # positions behind a cache are plain ones
        self.say(dict(batch), family.visual_mask(model, batch))


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_early", "fastv", "none"])
def test_an_image_then_words(name: str, policy: str) -> None:
    case = Case.of(name, RAGGED)
    talk = Talk(case, POLICIES[policy])
    talk.say(case.batch, case.visual)
    talk.say_words(1, 1, 5, 1, 2, 1)


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_early", "fastv"])
def test_words_then_an_image(name: str, policy: str) -> None:
    """The image of a later turn is pruned, and not annealed."""
    case = Case.of(name, [[T(4)], [T(6)]])
    talk = Talk(case, POLICIES[policy])
    talk.say(case.batch)
    talk.say_words(1, 3)
    talk.show(1, [[T(2), I(), T(3)], [T(1), I(), T(4)]])
    talk.say_words(1, 1, 4, 1)


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_early", "fastv", "vtw"])
def test_two_images_one_after_the_other(name: str, policy: str) -> None:
    """The first image goes on being annealed when a second one comes."""
    case = Case.of(name, RAGGED)
    talk = Talk(case, POLICIES[policy])
    talk.say(case.batch, case.visual)
    talk.say_words(1, 1, 3)
    talk.show(1, [[T(2), I(), T(3)], [T(1), I(), T(4)]])
    talk.say_words(1, 1, 4, 1)
    talk.show(2, [[T(1), I(), T(3)], [T(2), I(), T(2)]])
    talk.say_words(1, 1)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_ranking_anew(name: str, every: int) -> None:
    """From every k-th decode step on, tokens leave in the order of that step's attention."""
    policy = replace(ST3, first_drop=0.2, rerank_every=every)  # type: ignore[call-arg]
    case = Case.of(name, RAGGED)
    talk = Talk(case, policy)
    talk.say(case.batch, case.visual)
    talk.say_words(*[1] * 13)


def test_ranking_anew_changes_what_is_seen() -> None:
    case = Case.of("llava", SOLO)
    plain = st3.ST3(first_drop=0.2, stride=2, anneal=ST3.anneal)  # type: ignore[attr-defined]
    fresh = st3.ST3(first_drop=0.2, stride=2, anneal=ST3.anneal, rerank_every=1)  # type: ignore[attr-defined]
    old, new = (torch.stack(case.generate(p, 6).logits) for p in (plain, fresh))
    assert (old - new).abs().max() > 1e-3


def test_placeholders_behind_a_prompt_are_no_image() -> None:
    """Prompt lookup copies them from the prompt. Gemma 4 looks for them in every pass."""
    case = Case.of("gemma4", SOLO)
    cache, ids = DynamicCache(config=case.model.config), words(1, 3, 1)["input_ids"]
    ids[0, 0] = case.model.config.image_token_id
    mask = torch.cat([case.batch["attention_mask"], torch.ones_like(ids)], 1)
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        case.model(**case.batch, **{CACHE: cache})
        case.model(input_ids=ids, attention_mask=mask, **{CACHE: cache})
    assert trimmer.report.n_visual == case.visual.sum(1).tolist()
    assert trimmer.report.steps == 3


# -- generate(), turn by turn -------------------------------------------------------------------


def turn(case: Case, out: Any, new: dict[str, Tensor], tokens: int = 5) -> dict[str, Any]:
    """The arguments of generate() for a turn behind ``out``."""
    ids = torch.cat([out.sequences, new["input_ids"]], 1)
    mask = torch.cat([case.batch["attention_mask"], torch.ones_like(ids[:, case.width :])], 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        CACHE: cache_of(out),
        "max_new_tokens": tokens,
        "output_logits": True,
        "return_dict_in_generate": True,
        "do_sample": False,
    }


@ON_EACH
def test_a_further_turn_of_text(name: str) -> None:
    case = Case.of(name, RAGGED)
    new = words(2, 4, seed=9)
    schedule = case.schedule(ST3)
    with st3.trim(case.model, ST3), torch.no_grad():
        first = case.generate(None, 6)
        second = case.model.generate(**turn(case, first, new))
        third = case.model.generate(**{**turn(case, second, new), CACHE: cache_of(second)})
    now = reference._new_pass(case.batch, schedule, case.visual, None, None)
    cache = reference.full_cache(case.model)
    with reference._running(case.model, now), torch.no_grad():
        slow = case.generate(None, 6, **{CACHE: cache})
        for out in (second, third):
            slow = case.model.generate(**turn(case, slow, new))
            assert_same(torch.stack(out.logits), torch.stack(slow.logits))
            assert torch.equal(out.sequences, slow.sequences)


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_a_further_turn_with_an_image(name: str) -> None:
    case = Case.of(name, SOLO)
    batch = dict(case.family.inputs(case.model, [[T(2), I(), T(3)]], seed=4))
    visual = case.family.visual_mask(case.model, batch)
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        first = case.generate(None, 6)
        images = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        second = case.model.generate(**turn(case, first, batch), **images)
        report = trimmer.report
    slow = Conversation(case.model, case.schedule(ST3))
    slow.chunk(case.batch, case.visual)
    ids, mask = second.sequences, torch.ones_like(second.sequences)

    def feed(start: int, end: int, **more: Any) -> Tensor:
        inputs = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **more}
        seen = more.pop("visual", None)
        inputs.pop("visual", None)
        return slow.chunk(inputs, seen)[:, -1]

    for at in range(case.width, case.width + 5):
        feed(at, at + 1)
    # The last token of the answer was not fed yet: it comes with the next turn.
    start, end = case.width + 5, case.width + 6 + batch["input_ids"].shape[1]
    shown = torch.nn.functional.pad(visual, (1, 0))
    wanted = [feed(start, end, visual=shown, **images)]
    wanted += [feed(at, at + 1) for at in range(end, end + 4)]
    assert_same(torch.stack(second.logits), torch.stack(wanted))
    assert report.n_visual == [int(visual.sum())]
    assert report.steps == 4
