"""Attention of one query over keys that are stored size first: made for 16-bit numbers on CPUs,
tried here in fp32, where it must agree with the slow reference like everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import st3
from st3.engine import decode
from st3.engine.layout import allocate, is_size_first
from tests.helpers import ANNEAL, POLICIES, ST3, Case, assert_same
from tests.test_cache import Run
from tests.test_serve_batch import Company
from tests.test_turns import RAGGED, Talk, words
from tests.zoo import I, T, base, build

RERANKED = st3.ST3(first_drop=0.3, final_keep=0.2, stride=2, anneal=ANNEAL, rerank_every=2)


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Also fp32 is stored size first. Gives the size of each table of which rows were summed."""
    sums: list[int] = []
    weighted = decode._weighted_rows

    def noted(table: Tensor, *args: Any) -> Tensor:
        sums.append(table.numel())
        return weighted(table, *args)

    monkeypatch.setattr(decode, "suits", lambda states: True)
    monkeypatch.setattr(decode, "_weighted_rows", noted)
    return sums


@pytest.fixture(params=[2, 4], ids=["grouped", "full"])
def kv_heads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Key and value heads of the models' four heads."""
    monkeypatch.setitem(base.TEXT, "num_key_value_heads", request.param)
    return int(request.param)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "policy", [ST3, POLICIES["fastv"], st3.DyCoke(layer=2, keep=0.3, every=3)], ids=str
)
def test_a_ragged_batch(name: str, policy: st3.Policy, fp32: list[int], kv_heads: int) -> None:
    case = Case.of(name)
    # Past the headroom of the buffers.
    case.check_generate(policy, 40)
    heads = case.model.config.get_text_config(decoder=True).num_key_value_heads
    assert bool(fp32) == (heads == 4)


def test_buffers_lie_size_first(fp32: list[int]) -> None:
    run = Run(Case.of("llava"))
    for count in (1, 1, 3, 1):
        run.feed(words(3, count, count)["input_ids"])
    run.cache.reorder_cache(torch.tensor([1, 1, 0]))
    run.feed(words(3, 1, 1)["input_ids"])
    run.cache.batch_select_indices(torch.tensor([2]))
    for layer in run.cache.layers:
        assert is_size_first(layer.buffer)
        assert layer.buffer.shape[2] % 16 == 0
        assert not is_size_first(layer.values)


@pytest.mark.parametrize(
    ("policy", "options"),
    [(ST3, {"num_beams": 3, "num_return_sequences": 2}), (RERANKED, {})],
    ids=["beams", "reranked"],
)
def test_the_usual_layout_says_the_same(
    policy: st3.Policy,
    options: dict[str, Any],
    fp32: list[int],
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case.of("llava")
    out = case.generate(policy, 24, **options)
    monkeypatch.setattr(decode, "suits", lambda states: False)
    usual = case.generate(policy, 24, **options)
    assert torch.equal(out.sequences, usual.sequences)
    assert_same(torch.stack(out.logits, 1), torch.stack(usual.logits, 1))


@pytest.mark.parametrize("name", ["llava", "gemma3", "kimi_k25"])
def test_turns(name: str, fp32: list[int], kv_heads: int) -> None:
    case = Case.of(name, RAGGED)
    talk = Talk(case, ST3)
    talk.say(case.batch, case.visual)
    talk.say_words(1, 1, 5, 1, 2, 1)
    talk.show(1, [[T(2), I(), T(2)]] * 2)
    talk.say_words(1, 3, 1)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_rows_join_a_batch(name: str, fp32: list[int], kv_heads: int) -> None:
    both = Company(*build(name))
    prompts = [[T(5), I(), T(4)], [T(2), I(), T(11)]]
    inputs = [both.family.inputs(both.model, prompts, only=i) for i in range(2)]
    both.change([], {0: both.prefilled(0, inputs[0], ST3)})
    both.step(4)
    both.change([], {1: both.prefilled(1, inputs[1], ST3)})
    both.step(20)
    assert all(is_size_first(layer.buffer) for layer in both.batch.layers)
    for i in range(2):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], ST3, len(got)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_sums_of_rows_are_attention(masked: bool, dtype: torch.dtype) -> None:
    """Of a part of buffers whose other columns hold garbage; at most a rounding away."""
    torch.manual_seed(0)
    batch, heads, size, columns = 3, 2, 16, 20
    query = torch.randn(batch, 1, heads, size, dtype=dtype).transpose(1, 2)
    like = torch.empty(batch, heads, 1, size, dtype=dtype)
    buffers = allocate(like, 32, size_first=True), allocate(like, 48)
    key, value = (b.fill_(float("nan")).narrow(2, 5, columns) for b in buffers)
    for part in (key, value):
        part.copy_(torch.randn(part.shape))
    seen = torch.arange(columns) >= torch.tensor([0, 3, 9])[:, None]
    mask = seen[:, None, None] if masked else None
    assert decode._are_rows(query, key, value)
    module = torch.nn.Module()
    output, _ = decode.dense_decode(module, query, key, value, mask, 0.3)
    exact = scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask, scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)
    grouped, _ = decode.matmul_decode(module, query, key, value, mask, 0.3)
    torch.testing.assert_close(grouped.float(), exact, rtol=0.02, atol=0.02)
