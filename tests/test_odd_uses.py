"""Uses that nobody planned: each gives the same answers, or one error that names the remedy."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import st3
from st3.engine.events import Observer, StepEvent
from st3.hf.call import CACHE, cache_of
from tests.helpers import ST3, Case, parts
from tests.test_cache import Run
from tests.test_turns import words
from tests.zoo import I, T

ON_EACH = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "smolvlm"])


def logits(out: Any) -> Tensor:
    return torch.stack(out.logits, 1)


def in_another_thread(case: Case) -> Tensor:
    """The answer's logits there, at the most in half a minute."""
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(logits(case.generate(None, 4))))
    thread.daemon = True
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the other thread waits for a pass that is over"
    return found[0]


@ON_EACH
@pytest.mark.parametrize("place", ["layer", "prefill", "model", "inner", "text", "behind"])
def test_a_pass_that_is_interrupted_locks_out_nobody(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch calls no hook behind a KeyboardInterrupt."""
    case = Case.of(name)
    alone = logits(case.generate(ST3, 4))
    calls = 0

    def interrupt(*given: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if place != "layer" or calls == 3:
            raise KeyboardInterrupt

    with st3.trim(case.model, ST3) as trimmer:
        attachment = trimmer._attachment
        assert attachment is not None
        with monkeypatch.context() as patched:
            if place == "layer":
                handle = parts(case.model)[1][4].register_forward_pre_hook(interrupt)
            elif place == "prefill":
                patched.setattr("st3.engine.prefill.select", interrupt)
            elif place == "model":
                patched.setattr("st3.hf.call.arguments", interrupt)
            elif place == "inner":
                patched.setattr(attachment.visual, "begin", interrupt)
            else:
                wanted = "begin" if place == "text" else "end"
                patched.setattr(attachment.session, wanted, interrupt)
            with pytest.raises(KeyboardInterrupt):
                case.generate(None, 4)
        if place == "layer":
            handle.remove()
        assert torch.equal(in_another_thread(case), alone)
        assert torch.equal(logits(case.generate(None, 4)), alone)


def broken_off(*given: Any) -> None:
    raise ValueError("broken off")


def test_a_cache_whose_pass_was_broken_off_is_refused_outside_of_the_block() -> None:
    run = Run(Case.of("llava", [[T(5), I(), T(4)]]))
    handle = parts(run.case.model)[1][4].register_forward_pre_hook(broken_off)
    with pytest.raises(ValueError, match="broken off"):
        run.feed(words(1, 1, 1)["input_ids"])
    handle.remove()
    with pytest.raises(st3.TrimStateError, match="while it is trimmed"), torch.no_grad():
        run.case.model(**run.inputs(words(1, 1, 1)["input_ids"]), **{CACHE: run.cache})


@pytest.mark.parametrize("which", ["model", "text model"])
def test_text_meets_no_pass_that_was_broken_off(which: str) -> None:
    case, ids = Case.of("llava"), words(1, 7, 1)["input_ids"]
    text, layers = parts(case.model)
    run = case.model if which == "model" else text
    with torch.no_grad():
        alone = run(input_ids=ids)[0]
        with st3.trim(case.model, ST3):
            handle = layers[4].register_forward_pre_hook(broken_off)
            with pytest.raises(ValueError, match="broken off"):
                case.model(**case.batch)
            handle.remove()
            assert torch.equal(run(input_ids=ids)[0], alone)


@ON_EACH
def test_a_client_that_leaves_changes_no_later_answer(name: str) -> None:
    case = Case.of(name, [[T(5), I(), T(4)]])
    alone = logits(case.generate(ST3, 4))

    class Leaves(BaseStreamer):
        seen = 0

        def put(self, value: Any) -> None:
            self.seen += 1
            if self.seen == 3:
                raise ConnectionError("the client left")

        def end(self) -> None:
            """Never reached."""

    with st3.trim(case.model, ST3):
        with pytest.raises(ConnectionError):
            case.generate(None, 4, streamer=Leaves())
        assert torch.equal(logits(case.generate(None, 4)), alone)


@ON_EACH
def test_an_observer_that_raises_stops_its_own_run_only(name: str) -> None:
    class Raises(Observer):
        def step(self, event: StepEvent) -> None:
            raise RuntimeError("an observer's own")

    case = Case.of(name)
    alone = logits(case.generate(ST3, 4))
    with st3.trim(case.model, ST3) as trimmer:
        with pytest.raises(RuntimeError, match="an observer's own"), trimmer.observe(Raises()):
            case.generate(None, 4)
        assert torch.equal(in_another_thread(case), alone)


@ON_EACH
def test_a_policy_put_on_top_while_observed_stays(name: str) -> None:
    class Attends(Observer):
        attends = True

    case = Case.of(name)
    alone, bare = logits(case.generate(ST3, 3)), logits(case.generate(None, 3))
    lower = st3.trim(case.model, "none").attach()
    with lower.observe(Attends()):
        upper = st3.trim(case.model, ST3).attach()
    assert torch.equal(logits(case.generate(None, 3)), alone)
    upper.detach()
    assert torch.equal(logits(case.generate(None, 3)), bare)
    lower.detach()


# -- compact() -------------------------------------------------------------------------------------


@ON_EACH
def test_compacting_between_steps_changes_nothing_and_within_one_is_refused(name: str) -> None:
    class Compacts(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            trimmer.compact()
            return scores

    case = Case.of(name)
    alone = logits(case.generate(ST3, 4))
    with st3.trim(case.model, ST3) as trimmer:
        out = case.generate(None, 4, logits_processor=LogitsProcessorList([Compacts()]))
        assert torch.equal(logits(out), alone)

        def within(module: nn.Module, args: Any) -> None:
            trimmer.compact()

        handle = parts(case.model)[1][4].register_forward_pre_hook(within)
        with pytest.raises(st3.TrimStateError, match="between passes"):
            case.generate(None, 4)
        handle.remove()
        assert torch.equal(logits(case.generate(None, 4)), alone)


# -- what is passed in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        ("image", "str"),
        ([[True]], "list"),
        (torch.ones(4, dtype=torch.bool), r"torch.bool of shape \(4,\)"),
        (torch.ones(1, 4, dtype=torch.long), r"torch.int64 of shape \(1, 4\)"),
        (torch.ones(1, 4), r"torch.float32 of shape \(1, 4\)"),
    ],
)
def test_a_visual_mask_of_another_kind(mask: Any, given: str) -> None:
    with pytest.raises(TypeError, match=f"visual_mask is {given}: pass a bool tensor"):
        st3.trim(Case.of("llava").model, ST3, visual_mask=mask)


def test_a_visual_mask_without_any_visual_token() -> None:
    case = Case.of("llava", [[T(9)]])
    embeds = case.model.get_input_embeddings()(case.batch["input_ids"])
    empty = torch.zeros_like(case.valid)
    with torch.no_grad():
        bare = case.model(inputs_embeds=embeds).logits
        with st3.trim(case.model, ST3, visual_mask=empty) as trimmer:
            assert torch.equal(case.model(inputs_embeds=embeds).logits, bare)
    with pytest.raises(st3.TrimStateError, match="no image"):
        _ = trimmer.report


def test_a_model_in_a_wrapper_is_named() -> None:
    model = Case.of("llava").model
    with pytest.raises(st3.UnsupportedModelError, match=r"DataParallel wraps .* st3.trim\(model.m"):
        st3.trim(nn.DataParallel(model))


def test_a_trimmed_cache_under_a_policy_that_drops_nothing() -> None:
    case = Case.of("llava", [[T(5), I(), T(4)]])
    with torch.no_grad():
        with st3.trim(case.model, ST3):
            cache = cache_of(case.model(**case.batch, use_cache=True))
        with (
            st3.trim(case.model, "none"),
            pytest.raises(st3.TrimStateError, match="under a policy that drops tokens"),
        ):
            case.model(input_ids=torch.tensor([[3]]), **{CACHE: cache})
