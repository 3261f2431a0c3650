"""Compiled decode steps give the answers of plain ones. The backend "eager" traces one graph, as
every backend does, and then runs it as it is: what is tested is the graph, not the compiler."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import st3
from st3.engine.kv.layout import allocate
from st3.hf import graphs
from st3.hf.cache import stores_of
from st3.hf.call import cache_of
from tests.helpers import ST3, Case, assert_same, parts
from tests.test_modes import SOLO
from tests.test_trimmer import traces

EAGER = {"backend": "eager"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("rows", [SOLO, None], ids=["solo", "ragged"])
def test_answers_are_those_of_plain_decoding(name: str, rows: Any) -> None:
    case = Case.of(name, rows)
    plain = case.generate(ST3, 40)  # beyond a bucket
    before = traces(case.model)
    with st3.trim(case.model, ST3, compile_decode=EAGER):
        out = case.generate(None, 40)
    assert traces(case.model) == before
    assert_same(torch.stack(out.logits), torch.stack(plain.logits))
    assert torch.equal(out.sequences, plain.sequences)


@pytest.mark.slow
def test_free_columns_reach_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a prompt's own buffer is already as long as a bucket."""
    case = Case.of("llava", SOLO)
    plain = case.generate(ST3, 8)
    with st3.trim(case.model, ST3, own_cache=True):
        cache = cache_of(case.generate(None, 2))
    bucket = stores_of(cache)[0].filled.capacity

    def full_of_nans(*args: Any, **kwargs: Any) -> torch.Tensor:
        return allocate(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr("st3.engine.kv.buffer.allocate", full_of_nans)
    with st3.trim(case.model, ST3, compile_decode=EAGER, decode_bucket=bucket):
        out = case.generate(None, 8)
    assert_same(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.slow
def test_beams() -> None:
    case = Case.of("llava")
    plain = case.generate(ST3, 6, num_beams=2)
    with st3.trim(case.model, ST3, compile_decode=EAGER):
        out = case.generate(None, 6, num_beams=2)
    assert torch.equal(out.sequences, plain.sequences)


@pytest.mark.slow
def test_several_prompts_one_after_the_other() -> None:
    case = Case.of("llava", SOLO)
    plain = case.generate(ST3, 4)
    with st3.trim(case.model, ST3, compile_decode=EAGER) as trimmer:
        for _ in range(2):
            out = case.generate(None, 4)
            assert torch.equal(out.sequences, plain.sequences)
        assert trimmer.report.steps == 3


def test_unknown_modes_and_rerank_are_refused() -> None:
    model = Case.of("llava").model
    text, _ = parts(model)
    before = traces(model)
    with pytest.raises(ValueError, match="use one of graphs, default, reduce-overhead"):
        st3.trim(model, ST3, compile_decode="fast").attach()
    with pytest.raises(st3.UnsupportedModelError, match="or use another policy"):
        st3.trim(model, "dycoke:layer=2", compile_decode="default").attach()
    policy = st3.ST3(stride=2, rerank_every=2)
    with pytest.raises(st3.UnsupportedModelError, match="leave rerank_every"):
        st3.trim(model, policy, compile_decode="default").attach()
    assert traces(model) == before
    assert text.config._attn_implementation == "sdpa"


class Again:
    """Stands in for a CUDA graph: a replay does the recorded work again, on the same tensors."""

    def __init__(self, work: Callable[[], torch.Tensor], device: torch.device) -> None:
        self.work, self.hidden, self.replays = work, torch.empty(0), 0
        RECORDED.append(self)

    def replay(self) -> None:
        self.hidden, self.replays = self.work(), self.replays + 1


RECORDED: list[Again] = []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    RECORDED.clear()
    steps = functools.partial(graphs.RecordedSteps, record=Again)
    monkeypatch.setattr(graphs, "RecordedSteps", steps)
    return RECORDED


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("rows", [SOLO, None], ids=["solo", "ragged"])
def test_recorded_steps_give_the_answers_of_plain_decoding(
    name: str, rows: Any, recorded: list[Again]
) -> None:
    """Also where buffers move on the way, and for a second prompt."""
    case = Case.of(name, rows)
    plain = case.generate(ST3, 40)
    before = traces(case.model)
    with st3.trim(case.model, ST3, compile_decode="graphs", decode_bucket=32):
        for _ in range(2):
            out = case.generate(None, 40)
            assert_same(torch.stack(out.logits), torch.stack(plain.logits))
            assert torch.equal(out.sequences, plain.sequences)
    assert traces(case.model) == before
    # 39 steps each; those for which a buffer was made or moved run as they are.
    assert len(recorded) >= 4
    assert sum(graph.replays for graph in recorded) > 2 * 39 - 2 * len(recorded)


def test_recorded_steps_hold_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful:
        """Does the work once, and as a CUDA graph holds nothing of it but what it gave."""

        def __init__(self, work: Callable[[], torch.Tensor], device: torch.device) -> None:
            self.hidden = work()

        def replay(self) -> None:
            pass

    steps = functools.partial(graphs.RecordedSteps, record=Forgetful)
    monkeypatch.setattr(graphs, "RecordedSteps", steps)
    case = Case.of("llava", SOLO)
    with st3.trim(case.model, ST3, compile_decode="graphs"):
        out = case.generate(None, 4)
        held = [weakref.ref(cache_of(out)), weakref.ref(stores_of(cache_of(out))[0])]
        del out
        gc.collect()
        assert [one() for one in held] == [None, None]


def test_graphs_need_a_gpu_and_a_cache_that_stays_in_its_place() -> None:
    case = Case.of("llava", SOLO)
    with (
        st3.trim(case.model, ST3, compile_decode="graphs"),
        pytest.raises(st3.UnsupportedModelError, match="the model is on cpu"),
    ):
        case.generate(None, 4)
    model = Case.of("qwen3_5", SOLO).model
    with pytest.raises(st3.UnsupportedModelError, match="use compile_decode='default'"):
        st3.trim(model, st3.FastV(), compile_decode="graphs").attach()
