"""The engine: equal answers in any company, the KV budget, the queue, cancelling, shutting down."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from st3.tools.serve.engine import Engine
from st3.tools.serve.errors import ServeError
from st3.tools.serve.sampling import Sampling, check_generation_config
from st3.tools.serve.text import TextStream
from st3.tools.serve.ticket import Delta, Failed, Finished, Request, Ticket
from tests.serving import POLICIES, Alone, load, mixed, picture, turn, until

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return load(tiny_model)


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[Engine]:
    running = Engine(*loaded, kv_budget_bytes=64 << 20)
    yield running
    running.close()


class Caller:
    """Submits requests and gathers their events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.queues: list[SimpleQueue[Any]] = []

    def submit(self, request: Request) -> Ticket:
        queue: SimpleQueue[Any] = SimpleQueue()
        ticket = self.engine.submit(request, queue.put)
        self.queues.append(queue)
        return ticket

    def ends(self) -> list[tuple[str, Finished | Failed]]:
        """The streamed text and the last event of each request."""
        found = []
        for queue in self.queues:
            text = ""
            while isinstance(event := queue.get(timeout=60), Delta):
                text += event.text
            found.append((text, event))
        return found


def test_answers_in_company_are_the_answers_alone(engine: Engine, loaded: Loaded) -> None:
    alone, caller, requests = Alone(*loaded), Caller(engine), mixed(15)
    wanted = [
        alone.tokens(messages, body["st3"]["policy"], body["max_tokens"])
        for messages, body in requests
    ]
    for number, (messages, body) in enumerate(requests):
        caller.submit(
            engine.prepare(messages, policy=body["st3"]["policy"], max_tokens=body["max_tokens"])
        )
        if number % 4 == 3:  # the others arrive while these are running
            until(lambda: engine.stats().waiting == 0)
    for (text, end), tokens in zip(caller.ends(), wanted, strict=True):
        assert isinstance(end, Finished)
        assert list(end.token_ids) == tokens
        assert text == end.text == loaded[1].tokenizer.decode(tokens, skip_special_tokens=True)
    assert engine.stats().most_running > 4


def test_what_is_told_of_an_answer(engine: Engine, loaded: Loaded) -> None:
    end = engine.complete(engine.prepare(turn("describe", picture()), max_tokens=5))
    schedule = engine.trimmer("thirds").schedule
    assert end.visual_tokens == 16
    assert end.mean_share == pytest.approx(sum(schedule.kept(la, 16) for la in range(8)) / 128)
    assert 0 <= end.queued <= end.ttft <= end.total
    assert end.kv_bytes == engine.budget.bytes(
        [engine.prepare(turn("describe", picture()), max_tokens=5).columns]
    )


def test_one_seed_gives_one_answer_in_any_company(engine: Engine) -> None:
    def request(seed: int, policy: str = "balanced") -> Request:
        sampling = Sampling(temperature=1.0, seed=seed)
        messages = turn("describe the image", picture(1))
        return engine.prepare(messages, max_tokens=12, sampling=sampling, policy=policy)

    alone = engine.complete(request(5)).token_ids
    caller = Caller(engine)
    for seed, policy in ((1, "none"), (5, "balanced"), (2, "balanced"), (5, "balanced")):
        caller.submit(request(seed, policy))
    ids = [end.token_ids for _, end in caller.ends() if isinstance(end, Finished)]
    assert ids[1] == ids[3] == alone
    assert ids[2] != alone


def test_sampling_follows_temperature_and_top_p(engine: Engine) -> None:
    def answer(**options: Any) -> tuple[int, ...]:
        messages = turn("describe the image", picture(1))
        request = engine.prepare(messages, max_tokens=12, sampling=Sampling(**options))
        return engine.complete(request).token_ids

    greedy = answer()
    assert answer(temperature=0, seed=3) == greedy
    assert answer(temperature=1.0, top_p=1e-6, seed=3) == greedy
    assert answer(temperature=1e-4, seed=3) == greedy
    assert answer(temperature=2.0, seed=3) != greedy


def test_a_stop_string_ends_the_answer(engine: Engine) -> None:
    messages = turn("describe the image", picture(1))
    whole = engine.complete(engine.prepare(messages, max_tokens=20)).text
    words = whole.split()
    stop = " ".join(words[6:8])
    caller = Caller(engine)
    caller.submit(engine.prepare(messages, max_tokens=20, stop=("nothing like it", stop)))
    ((text, end),) = caller.ends()
    assert isinstance(end, Finished)
    assert end.reason == "stop"
    assert text == end.text == whole[: whole.index(stop)]
    assert len(end.token_ids) < 20


class Letters:
    """A tokenizer of bytes; tokens above 255 are special."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("héllo wörld €5", (), "héllo wörld €5"),
        ("one two three", ("two",), "one "),
        ("one twenty", ("two",), "one twenty"),
        ("aab", ("ab",), "a"),
        ("one tw", ("two",), "one tw"),
    ],
)
def test_text_comes_whole_and_stops(text: str, stop: tuple[str, ...], wanted: str) -> None:
    stream = TextStream(Letters(), stop)
    pieces = []
    for token in [*text.encode(), 300]:
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1]
        if stream.stopped:
            break
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text == wanted


def test_a_broken_last_character_is_given_out_at_the_end() -> None:
    stream = TextStream(Letters())
    assert "".join(stream.push(t) for t in "ab€".encode()[:-1]) == "ab"
    assert stream.close() == "\ufffd"


@pytest.mark.parametrize("policy", ["none", "balanced:first_drop=0.8,stride=2"])
def test_the_budget_is_never_overrun(loaded: Loaded, policy: str) -> None:
    probe = Engine(*loaded, policy, kv_budget_bytes=64 << 20)
    request = probe.prepare(turn("describe", picture(), picture(1)), max_tokens=24)
    one = probe.budget.bytes([request.columns])
    probe.close()
    engine = Engine(*loaded, policy, kv_budget_bytes=int(3.5 * one), max_prefills_per_step=1)
    caller = Caller(engine)
    for _ in range(9):
        caller.submit(request)
    most = 0
    while (stats := engine.stats()).waiting or stats.running:
        assert stats.reserved <= stats.budget
        most = max(most, stats.allocated)
    assert all(isinstance(end, Finished) for _, end in caller.ends())
    assert engine.stats().most_running == 3
    assert 0 < most <= engine.budget.total
    engine.close()
    assert engine.stats().reserved == engine.stats().allocated == 0


def test_trimming_lets_more_requests_run_at_once(loaded: Loaded) -> None:
    """The bar: 2.5 times as many, in a budget that holds four untrimmed ones."""
    images = [picture(i) for i in range(12)]  # 192 visual tokens of 16-token pictures
    most = {}
    for policy in ("none", "balanced:first_drop=0.8,stride=2,final_keep=0"):
        probe = Engine(*loaded, policy, kv_budget_bytes=64 << 20)
        untrimmed = probe.prepare(turn("describe", *images), max_tokens=12, policy="none")
        budget = 4 * probe.budget.bytes([untrimmed.columns])
        probe.close()
        engine = Engine(*loaded, policy, budget, max_prefills_per_step=16)
        caller = Caller(engine)
        for _ in range(20):
            caller.submit(engine.prepare(turn("describe", *images), max_tokens=12))
        assert all(isinstance(end, Finished) for _, end in caller.ends())
        most[policy] = engine.stats().most_running
        engine.close()
    untrimmed_most, trimmed_most = most.values()
    assert untrimmed_most == 4
    assert trimmed_most >= 10


def test_what_can_never_fit_is_refused(loaded: Loaded) -> None:
    engine = Engine(*loaded, kv_budget_bytes=200_000)
    with pytest.raises(ServeError, match="KV cache") as caught:
        engine.prepare(turn("describe", picture()), max_tokens=400)
    assert (caught.value.status, caught.value.code) == (400, "kv_budget_exceeded")
    engine.complete(engine.prepare(turn("describe", picture()), max_tokens=4))
    engine.close()


def test_the_queue_has_an_end(loaded: Loaded) -> None:
    engine = Engine(*loaded, kv_budget_bytes=64 << 20, max_rows=1, queue_limit=2)
    request = engine.prepare(turn("describe", picture()), max_tokens=200)
    caller = Caller(engine)
    tickets = [caller.submit(request)]
    until(lambda: engine.stats().running == 1)
    tickets += [caller.submit(request), caller.submit(request)]
    with pytest.raises(ServeError) as caught:
        engine.submit(request, print)
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    for ticket in tickets:
        ticket.cancel()
    until(lambda: engine.stats().running == engine.stats().waiting == 0)
    engine.complete(engine.prepare(turn("describe"), max_tokens=2))
    engine.close()


def test_a_cancelled_request_frees_its_row_at_once(engine: Engine) -> None:
    caller = Caller(engine)
    request = engine.prepare(turn("describe", picture()), max_tokens=1500)
    ticket = caller.submit(request)
    other = engine.prepare(turn("describe", picture()), max_tokens=300)
    caller.submit(other)
    until(lambda: engine.stats().running == 2)
    ticket.cancel()
    until(lambda: engine.stats().running == 1)
    (_, first), (_, second) = caller.ends()
    assert isinstance(first, Failed)
    assert isinstance(second, Finished)


def test_time_runs_out_in_the_queue_and_on_the_way(loaded: Loaded) -> None:
    engine = Engine(*loaded, kv_budget_bytes=64 << 20, max_rows=1)
    caller = Caller(engine)
    for timeout in (0.3, 0.1):
        caller.submit(engine.prepare(turn("describe", picture()), max_tokens=1900, timeout=timeout))
    for _, end in caller.ends():
        assert isinstance(end, Failed)
        assert end.error.status == 504
    until(lambda: engine.stats().running == 0)
    engine.close()


def test_closing_finishes_what_was_accepted(loaded: Loaded) -> None:
    engine = Engine(*loaded, kv_budget_bytes=64 << 20, max_rows=2)
    caller = Caller(engine)
    request = engine.prepare(turn("describe", picture()), max_tokens=30)
    for _ in range(4):
        caller.submit(request)
    assert engine.close()
    assert all(isinstance(end, Finished) for _, end in caller.ends())
    with pytest.raises(ServeError) as caught:
        engine.submit(request, print)
    assert caught.value.status == 503


def test_closing_does_not_wait_for_ever(loaded: Loaded) -> None:
    engine = Engine(*loaded, kv_budget_bytes=64 << 20)
    caller = Caller(engine)
    caller.submit(engine.prepare(turn("describe", picture()), max_tokens=1900))
    assert not engine.close(0.2)
    ((_, end),) = caller.ends()
    assert isinstance(end, Failed)
    assert end.error.status == 503


def test_a_failing_model_fails_its_requests_and_not_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = engine.prepare(turn("describe", picture()), max_tokens=40)
    wanted = engine.complete(request).token_ids
    forward, calls = engine.model.forward, []

    @functools.wraps(forward)  # generate() reads the signature
    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in (1, 5):  # a prefill, then a decode step
            raise RuntimeError("broken")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", broken)
    for _ in range(2):
        with pytest.raises(ServeError) as caught:
            engine.complete(request)
        assert caught.value.status == 500
    assert engine.complete(request).token_ids == wanted
    assert engine.stats().reserved == 0


def test_a_listener_that_fails_is_dropped(engine: Engine) -> None:
    def fail(event: Any) -> None:
        raise RuntimeError("nobody listens")

    engine.submit(engine.prepare(turn("describe", picture()), max_tokens=1500), fail)
    until(lambda: engine.stats().running == engine.stats().waiting == 0)
    engine.complete(engine.prepare(turn("describe"), max_tokens=2))


def test_the_model_is_left_as_it_was(loaded: Loaded) -> None:
    model = loaded[0]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    engine = Engine(*loaded, kv_budget_bytes=64 << 20)
    for policy in POLICIES:
        engine.complete(engine.prepare(turn("describe", picture()), max_tokens=3, policy=policy))
    engine.close()
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "policy", ["nonsense", "st3:stride=0", "fastv:layer=99", "st3:recall_every=3"]
)
def test_policies_that_do_not_fit_are_refused(engine: Engine, policy: str) -> None:
    with pytest.raises(ServeError) as caught:
        engine.prepare(turn("describe", picture()), policy=policy)
    assert caught.value.status == 400


def test_settings_that_make_no_sense_are_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Engine(*loaded, queue_limit=0)
    with pytest.raises(ValueError, match="does not hold one token"):
        Engine(*loaded, kv_budget_bytes=10)
    with pytest.raises(ValueError, match="unknown policy"):
        Engine(*loaded, "nonsense")


def test_generation_configs_that_are_not_applied_are_refused() -> None:
    from transformers import GenerationConfig

    check_generation_config(GenerationConfig(repetition_penalty=1.2, do_sample=True, top_k=20))
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        check_generation_config(GenerationConfig(no_repeat_ngram_size=3))


def test_a_models_repetition_penalty_is_applied(loaded: Loaded, engine: Engine) -> None:
    model = loaded[0]
    model.generation_config.repetition_penalty = 1.7
    try:
        messages = turn("describe the image", picture(1))
        wanted = Alone(*loaded).tokens(messages, "thirds", 15)
        end = engine.complete(engine.prepare(messages, max_tokens=15))
    finally:
        model.generation_config.repetition_penalty = None
    assert list(end.token_ids) == wanted
    assert wanted != Alone(*loaded).tokens(messages, "thirds", 15)


def test_bfloat16_runs_as_well(tiny_model: Path) -> None:
    model, processor = load(tiny_model)
    engine = Engine(model.to(torch.bfloat16), processor, kv_budget_bytes=64 << 20)
    caller = Caller(engine)
    for messages, body in mixed(6):
        caller.submit(engine.prepare(messages, policy=body["st3"]["policy"], max_tokens=9))
    assert all(isinstance(end, Finished) for _, end in caller.ends())
    engine.close()
