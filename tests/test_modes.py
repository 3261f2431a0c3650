"""Ways of generating, on one family of each kind, against the slow reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import st3
from tests.helpers import ANNEAL, POLICIES, ST3, TEXT_ONLY, Case, answer, assert_same, images
from tests.zoo import I, T

# Plain; 3D positions; sliding windows and images that attend both ways; tiles between markers.
NAMES = ["llava", "qwen2_5_vl", "gemma3", "smolvlm"]
ON_EACH = pytest.mark.parametrize("name", NAMES)
SOLO = [[T(5), I(), T(4)]]
SEVERAL = [[T(2), I(), T(3), I(), I(), T(4)], [I(), T(6)], [T(3), I(), T(2)]]


@ON_EACH
def test_a_single_prompt(name: str) -> None:
    case = Case.of(name, SOLO)
    case.check_prefill(ST3)
    case.check_generate(ST3, 16)  # past the end of the annealing


@ON_EACH
def test_annealing_by_another_score(name: str) -> None:
    Case.of(name).check_generate(st3.ST3(score="key_norm", stride=2, anneal=ANNEAL), 8)


@ON_EACH
def test_several_images_in_a_prompt(name: str) -> None:
    case = Case.of(name, SEVERAL)
    case.check_prefill(ST3)
    case.check_generate(ST3, 8)


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_early", "fastv", "anneal_only"])
def test_a_budget_for_each_image(name: str, policy: str) -> None:
    case = Case.of(name, SEVERAL)
    spans = images(case)
    case.check_prefill(POLICIES[policy], spans=spans, per_image=True)
    case.check_generate(POLICIES[policy], 8, spans=spans)


def test_a_budget_for_each_image_is_not_one_for_all() -> None:
    case = Case.of("llava", SEVERAL)
    one, each = case.prefill(ST3)[1], case.prefill(ST3, per_image=True)[1]
    of_image = [each.kept_positions(7, 0) // 16 == i for i in range(3)]
    assert [int(x.sum()) for x in of_image] == [case.schedule(ST3).kept(7, 16)] * 3
    assert not torch.equal(one.kept_positions(7, 0), each.kept_positions(7, 0))


@pytest.mark.parametrize("name", ["llava", "llava_next", "pixtral"])
def test_a_budget_for_each_of_images_that_touch(name: str) -> None:
    case = Case.of(name, SEVERAL)
    report = case.prefill(ST3, per_image=True)[1]
    assert [len(row) for row in report.visual_per_image] == [len(row) for row in images(case)]
    case.check_generate(ST3, 5, spans=images(case), num_beams=2)
    case.check_generate(ST3, 5, spans=images(case), num_return_sequences=2, do_sample=True, seed=1)


@ON_EACH
def test_sampling(name: str) -> None:
    case = Case.of(name)
    case.check_generate(ST3, 10, do_sample=True, temperature=0.7, seed=5)


@ON_EACH
def test_several_answers_to_a_prompt(name: str) -> None:
    case = Case.of(name)
    case.check_generate(ST3, 8, do_sample=True, num_return_sequences=3, seed=6)


@ON_EACH
def test_beam_search(name: str) -> None:
    Case.of(name).check_generate(ST3, 8, num_beams=3)


def test_beam_sampling_with_several_answers() -> None:
    Case.of("llava").check_generate(
        ST3, 8, num_beams=4, do_sample=True, num_return_sequences=2, seed=7
    )


@ON_EACH
def test_an_answer_that_ends_early_in_one_row(name: str) -> None:
    """Finished rows are padded while the others go on."""
    case = Case.of(name)
    tokens = answer(case.generate(ST3, 8), case.width)
    stop = int(tokens[0, 3])
    case.check_generate(ST3, 8, eos_token_id=stop, pad_token_id=0)


class Passes:
    """Counts the tokens of each forward pass of the text model."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        self.text = model.get_decoder()

    def __enter__(self) -> Passes:
        self.hook = self.text.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        self.tokens.append((given if given is not None else kwargs["input_ids"]).shape[1])

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def repetitive(name: str) -> Case:
    """A prompt whose last words stood in it before, so that prompt lookup proposes what followed
    them: in the prefill and, as the tiny models repeat themselves, later on, too."""
    case = Case.of(name, [[T(8), I(), T(5)]])
    case.batch["input_ids"][0, -3:] = case.batch["input_ids"][0, :3]
    return case


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_static", "fastv", "none"])
def test_prompt_lookup_gives_the_tokens_of_plain_greedy_decoding(name: str, policy: str) -> None:
    case = repetitive(name)
    with Passes(case.model) as passes:
        out = case.generate(POLICIES[policy], 24, prompt_lookup_num_tokens=3)
    assert passes.tokens[0] > case.width  # candidates behind the prompt
    assert any(n > 1 for n in passes.tokens[1:])
    ids, logits = case.reference_generate(POLICIES[policy], 24)
    assert torch.equal(answer(out, case.width), ids)
    assert_same(torch.stack(out.logits, 1), logits)


def test_prompt_lookup_with_a_budget_for_each_image() -> None:
    case = Case.of("llava", [[T(8), I(), T(2), I(), T(5)]])
    case.batch["input_ids"][0, -3:] = case.batch["input_ids"][0, :3]
    out = case.generate(ST3, 24, prompt_lookup_num_tokens=3, per_image=True)
    ids, logits = case.reference_generate(ST3, 24, per_image_spans=images(case))
    assert torch.equal(answer(out, case.width), ids)
    assert_same(torch.stack(out.logits, 1), logits)


class Stream(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    case = Case.of("llava", SOLO)
    stream = Stream()
    out = case.generate(ST3, 8, streamer=stream)
    assert stream.ended
    assert stream.tokens == out.sequences[0].tolist()
    assert torch.equal(answer(out, case.width), case.reference_generate(ST3, 8)[0])


@pytest.mark.filterwarnings("error:st3 trims nothing")
@pytest.mark.parametrize("name", [*NAMES, "llava_next"])  # hands the token ids on by position
def test_a_text_prompt_passes_untouched(name: str) -> None:
    case = Case.of(name, TEXT_ONLY)
    bare = case.generate(None, 6)
    trimmed = case.generate(ST3, 6)
    assert torch.equal(trimmed.sequences, bare.sequences)
    assert torch.equal(torch.stack(trimmed.logits), torch.stack(bare.logits))
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        case.model(**case.batch)
    with pytest.raises(st3.TrimStateError, match="run the model on a prompt with an image"):
        _ = trimmer.report


@ON_EACH
def test_a_padded_row_equals_its_solo_run(name: str) -> None:
    case = Case.of(name)
    together = torch.stack(case.generate(ST3, 8).logits, 1)
    for row in range(len(case.visual)):
        alone = Case.of(name, only=row).generate(ST3, 8)
        assert_same(together[row], torch.stack(alone.logits, 1)[0])


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "fastv", "random"])
def test_eager_and_sdpa_agree(name: str, policy: str) -> None:
    case = Case.of(name)
    sdpa = torch.stack(case.generate(POLICIES[policy], 8).logits, 1)
    case.model.set_attn_implementation("eager")
    eager = torch.stack(case.generate(POLICIES[policy], 8).logits, 1)
    assert_same(sdpa, eager)


@ON_EACH
def test_half_precision(name: str) -> None:
    """bfloat16 runs and is about the same; another token may be kept where scores are close."""
    case = Case.of(name, SOLO)
    policy = POLICIES["random"]  # the same choice in both precisions
    exact = torch.stack(case.generate(policy, 4).logits, 1)
    case.model.to(torch.bfloat16)
    for key, value in case.batch.items():
        if value.is_floating_point():
            case.batch[key] = value.to(torch.bfloat16)
    rough = torch.stack(case.generate(policy, 4).logits, 1)
    assert torch.isfinite(rough).all()
    spread = exact[:, 0].std()
    assert (rough[:, 0] - exact[:, 0]).abs().mean() < 0.25 * spread
    ranked = case.generate(ST3, 8)
    assert torch.isfinite(torch.stack(ranked.logits)).all()
