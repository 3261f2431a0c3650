"""Compiled decode steps give the answers of plain ones. The backend "eager" traces one graph, as
every backend does, and then runs it as it is: what is tested is the graph, not the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import st3
from st3.engine.kv.layout import allocate
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
    with pytest.raises(ValueError, match="use one of default, reduce-overhead"):
        st3.trim(model, ST3, compile_decode="fast").attach()
    policy = st3.ST3(stride=2, rerank_every=2)
    with pytest.raises(st3.UnsupportedModelError, match="leave rerank_every at None"):
        st3.trim(model, policy, compile_decode="default").attach()
    assert traces(model) == before
    assert text.config._attn_implementation == "sdpa"
