"""What requests meet in an engine that trims: company, a full pool, an early end, many answers, and
what nobody should send."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm")

from st3.vllm.plan import Plan
from tests.vllm.checkpoints import KINDS, LAYERS
from tests.vllm.engine import Ask, Job, Result, run
from tests.vllm.library import EQUAL, Library, held
from tests.vllm.pictures import asks, picture

ST3 = "balanced:tau=16"
PVTP = "balanced:curve=none,score=attention"
TWO = {"n": 2, "temperature": 1, "top_k": 1}  # greedy by another name, which allows two answers
SHARED = "w60 " * 70  # text of more than two blocks


def crowd() -> list[Ask]:
    """Forty requests that come two at a time: with no image, one or two, of all lengths, some with
    three answers, some aborted before, in or after their prefill."""
    rng = np.random.default_rng(0)
    asked = []
    for i in range(40):
        words = " ".join(f"w{word}" for word in rng.integers(30, 120, int(rng.integers(1, 30))))
        images = i % 3
        params = {"max_tokens": int(rng.integers(1, 50))}
        if i % 8 == 1:
            params |= {**TWO, "n": 3, "logprobs": 2}
        at = i // 2
        abort = at + i % 4 if i % 7 == 3 else None
        text = f"{'<image> ' * images}{words}"
        asked.append(
            Ask(text, [picture(i + j) for j in range(images)], params=params, at=at, abort=abort)
        )
    return asked


def odd() -> list[Ask]:
    """Images of no size and of great size, nothing but an image, an image at the end, side by side;
    prompts and answers that are too long."""
    return [
        Ask("<image> w40", [Image.new("RGB", (0, 0))]),
        Ask("<image> w40", [Image.new("RGB", (1, 1), "red")]),
        Ask("<image> w40", [picture(3, 3200, 1600)]),
        Ask("<image>", [picture(4)]),
        Ask("w40 w41 <image>", [picture(5)]),
        Ask("<image> <image> w40", [picture(6), picture(7)]),
        Ask("<image> " + "w50 " * 340, [picture(8)]),  # 596 of 600 tokens: 4 more
        Ask("<image> " + "w50 " * 400, [picture(9)]),
        Ask("<image> w40", [picture(11)], params={"max_tokens": 1}),
    ]


def jobs(folder: Path) -> dict[str, Job]:
    base = asks("llava")
    long = [replace(ask, params={"max_tokens": 80}) for ask in base]
    text = [Ask(SHARED + "w31"), Ask(SHARED + "w32", at=3)]
    image = [Ask(f"{SHARED}<image> w40", [picture(1)], at=i) for i in (0, 3)]
    small = {"num_gpu_blocks_override": 156, "max_model_len": 600}
    return {
        "st3": Job(folder, ST3, base),
        "pvtp": Job(folder, PVTP, long),
        "preempted": Job(folder, PVTP, long, small),
        "annealed and preempted": Job(folder, "balanced:tau=400", long, small),
        "later": Job(folder, ST3, [replace(ask, at=3 * i) for i, ask in enumerate(base)]),
        "aborted": Job(
            folder,
            ST3,
            [replace(base[0], abort=5), *base[1:3], replace(base[3], at=2, abort=3)],
        ),
        "two answers": Job(folder, ST3, [replace(base[0], params=TWO), base[1]]),
        "beams": Job(folder, ST3, [base[0]], script="beam"),
        "whole": Job(folder, ST3, [replace(base[0], params={"prompt_logprobs": 0}), base[3]]),
        "whole, off": Job(folder, None, [replace(base[0], params={"prompt_logprobs": 0})]),
        "small": Job(folder, "fastv:layer=2,drop=0.1", base[:1]),
        "prefixes": Job(folder, ST3, [*text, *image], {"enable_prefix_caching": True}),
        "no prefixes": Job(folder, ST3, [*text, *image]),
        "chunks": Job(
            folder,
            ST3,
            base,
            {"enable_chunked_prefill": True, "max_num_batched_tokens": 300, "max_num_seqs": 4},
        ),
        "off": Job(folder, None, base),
        "crowd": Job(folder, PVTP, crowd(), small),
        "odd": Job(folder, PVTP, odd(), {"max_model_len": 600}),
        "ahead": Job(folder, ST3, base, schedules_ahead=True),
        "groups of four": Job(folder, ST3, base, st3={"layers_per_group": 4}),
    }


@pytest.fixture(scope="module")
def folder(checkpoint_folder: Path) -> Path:
    return KINDS["llava"].save(checkpoint_folder / "llava-requests")


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library(folder)


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run(jobs(folder), tmp_path_factory.mktemp("requests"))


def test_nothing_is_left_in_use(results: dict[str, Result]) -> None:
    assert {name: result.error for name, result in results.items() if result.error} == {}
    for left in ("in_use", "usage", "remembered"):
        by_name = {name: getattr(result, left) for name, result in results.items()}
        assert by_name == dict.fromkeys(results, 0), left


@pytest.mark.parametrize("name", ["st3", "pvtp"])
def test_blocks_held_by_step_are_the_schedules(
    folder: Path, results: dict[str, Result], name: str
) -> None:
    job, result = jobs(folder)[name], results[name]
    plan = Plan.choose(str(job.policy), LAYERS)
    assert len(result.groups) == plan.groups
    visual = [256 * len(ask.images) for ask in job.asks]
    lengths = [len(prompt) for prompt in result.prompts]
    seen = 0
    for step, (_, in_use, by_request) in enumerate(result.steps):
        assert in_use == sum(map(sum, by_request.values()))
        for name_of, blocks in by_request.items():
            i = int(name_of.split("-")[0])
            computed = 0 if step == 0 else lengths[i] + step - 1
            assert blocks == held(plan, lengths[i], visual[i], computed), (step, i)
            seen += 1
    assert seen > 60


def test_preemption_changes_no_token(results: dict[str, Result]) -> None:
    assert results["preempted"].preemptions > 0
    assert results["pvtp"].preemptions == 0
    assert results["preempted"].tokens == results["pvtp"].tokens


def test_annealing_survives_preemption(results: dict[str, Result]) -> None:
    """What was generated before is computed anew with all tokens that prefill kept, so tokens may
    differ behind it; nothing breaks or leaks."""
    result = results["annealed and preempted"]
    assert result.preemptions > 0
    assert [len(ids) for ids in result.tokens] == [80] * 4


@pytest.mark.parametrize("name", ["later", "groups of four"])
def test_company_changes_no_token(results: dict[str, Result], name: str) -> None:
    assert results[name].tokens == results["st3"].tokens
    assert results[name].logprobs[0][0] == pytest.approx(results["st3"].logprobs[0][0], abs=EQUAL)


def test_groups_may_hold_several_runs_of_layers(results: dict[str, Result]) -> None:
    assert results["groups of four"].groups == [4, 4]
    assert results["st3"].groups == [1] * LAYERS


def test_an_abort_hurts_nobody(results: dict[str, Result]) -> None:
    assert results["aborted"].tokens[1:3] == results["st3"].tokens[1:3]


def test_two_answers_are_each_the_one(results: dict[str, Result]) -> None:
    first, second = results["two answers"].ids[0]
    assert first == second == results["st3"].tokens[0]


def test_beams(results: dict[str, Result]) -> None:
    """Each step of vLLM's beam search is a request of its own, with a prompt that grows."""
    (beams,) = results["beams"].ids
    assert len(beams) == 2
    assert beams[0] != beams[1]


def test_who_wants_the_prompts_probabilities_is_not_trimmed(results: dict[str, Result]) -> None:
    result = results["whole"]
    assert result.counters["requests_passed_prompt_logprobs"] == 1
    assert result.counters["requests_trimmed"] == 1
    assert result.tokens[0] == results["whole, off"].tokens[0] == results["off"].tokens[0]
    assert result.tokens[1] == results["st3"].tokens[3]


def test_too_little_to_free_a_block(results: dict[str, Result]) -> None:
    assert results["small"].counters["requests_passed_small"] == 1
    assert results["small"].tokens[0] == results["off"].tokens[0]


def test_text_keeps_the_prefix_cache(results: dict[str, Result]) -> None:
    with_cache, without = results["prefixes"], results["no prefixes"]
    assert with_cache.tokens == without.tokens
    assert with_cache.cached == [0, 64, 0, 0]
    assert with_cache.counters["requests_trimmed"] == 2


def test_chunks_pass_untrimmed(library: Library, results: dict[str, Result]) -> None:
    result = results["chunks"]
    chunked = result.counters["requests_passed_chunked"]
    assert chunked + result.counters["requests_trimmed"] == 3
    assert chunked > 0
    for i in range(4):
        both = (results["st3"].tokens[i], results["off"].tokens[i])
        assert result.tokens[i] in both
    assert result.tokens[2] == results["off"].tokens[2]  # of two images: more than a step takes
    assert library.answer(asks("llava")[2], None).ids == result.tokens[2]


def test_a_crowd_gets_what_each_gets_alone(library: Library, results: dict[str, Result]) -> None:
    result, answered = results["crowd"], 0
    assert result.refused == {}
    assert max(running for running, _, _ in result.steps) > 3
    assert max(in_use for _, in_use, _ in result.steps) > 120  # of 155
    for i, ask in enumerate(crowd()):
        answers = result.ids[i]
        if not answers:
            assert ask.abort is not None
            continue
        answer = library.answer(ask, PVTP)
        assert len(answers) == ask.params.get("n", 1)
        for ids, logprobs in zip(answers, result.logprobs[i], strict=True):
            assert ids == answer.ids, i
            assert logprobs == pytest.approx(answer.logprobs, abs=EQUAL)
        answered += 1
    assert answered >= 34


def test_odd_requests_are_refused_or_answered(library: Library, results: dict[str, Result]) -> None:
    result = results["odd"]
    assert set(result.refused) == {0, 7}
    assert "600" in result.refused[7]
    for i, ask in enumerate(odd()):
        if i in result.refused:
            continue
        given = len(result.tokens[i])
        assert given == min(ask.params.get("max_tokens", 24), 600 - len(result.prompts[i]))
        assert result.tokens[i] == library.answer(ask, PVTP).ids[:given], i


def test_scheduling_ahead_changes_no_token(results: dict[str, Result]) -> None:
    """vLLM's scheduler is a step ahead of its workers, as on GPUs."""
    assert results["ahead"].tokens == results["st3"].tokens
