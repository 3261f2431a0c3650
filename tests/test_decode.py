"""Attention of one query over keys that are stored size first: made for 16-bit numbers on CPUs,
tried here in fp32, where it must agree with the slow reference like everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import st3
from st3.engine import decode
from st3.engine.kv.layout import allocate, is_size_first
from st3.hf.attention import on_unplanned_kernels
from st3.hf.cache import stores_of
from tests.helpers import ANNEAL, POLICIES, ST3, Case, assert_same
from tests.test_cache import Run
from tests.test_serve_batch import Company
from tests.test_turns import RAGGED, Talk, words
from tests.zoo import I, T, base, build

RERANKED = st3.ST3(first_drop=0.3, final_keep=0.2, stride=2, anneal=ANNEAL, rerank_every=2)


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Also fp32 is stored size first. Gives the columns of each sum of rows of such keys."""
    sums: list[int] = []
    logits = decode.bag_logits

    def noted(query: Tensor, key: Tensor, scaling: float | None = None) -> Tensor:
        sums.append(key.shape[2])
        return logits(query, key, scaling)

    monkeypatch.setattr(decode, "wants_size_first", lambda states: True)
    monkeypatch.setattr(decode, "bag_logits", noted)
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
    assert fp32


def test_buffers_lie_size_first(fp32: list[int]) -> None:
    run = Run(Case.of("llava"))
    for count in (1, 1, 3, 1):
        run.feed(words(3, count, count)["input_ids"])
    run.cache.reorder_cache(torch.tensor([1, 1, 0]))
    run.feed(words(3, 1, 1)["input_ids"])
    run.cache.batch_select_indices(torch.tensor([2]))
    for store in stores_of(run.cache).values():
        assert is_size_first(store.filled.keys)
        assert store.filled.capacity % 16 == 0
        assert not is_size_first(store.filled.values)


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
    monkeypatch.setattr(decode, "wants_size_first", lambda states: False)
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
    assert all(is_size_first(layer.filled.keys) for layer in both.batch.layers)
    for i in range(2):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], ST3, len(got)))


LAYOUTS = pytest.mark.parametrize("size_first", [False, True], ids=["plain", "size-first"])
# Query heads, KV heads: multi-head, two and six queries to a key, one key for all.
HEADS = pytest.mark.parametrize("heads", [(4, 4), (4, 2), (12, 2), (6, 1)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
COLUMNS, SIZE, FIRST = 20, 16, 5


def _states(
    heads: tuple[int, int], dtype: torch.dtype, size_first: bool, batch: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values; the latter are parts of buffers whose other columns hold garbage."""
    torch.manual_seed(0)
    query = torch.randn(batch, 1, heads[0], SIZE, dtype=dtype).transpose(1, 2)
    like = torch.empty(batch, heads[1], 1, SIZE, dtype=dtype)
    key, value = (
        allocate(like, columns, size_first=turned)
        .fill_(float("nan"))
        .narrow(2, FIRST, COLUMNS)
        .copy_(torch.randn(batch, heads[1], COLUMNS, SIZE))
        for columns, turned in ((32, size_first), (48, False))
    )
    return query, key, value


def _assert_attention(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> None:
    exact = scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask, scale=scale, enable_gqa=True
    )
    loose = {} if query.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(output.float(), exact.transpose(1, 2), **loose)


@LAYOUTS
@HEADS
@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 3], ids=["unmasked", "one-mask", "masked"])
@torch.no_grad()
def test_every_layout_is_attention(
    size_first: bool,
    heads: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
) -> None:
    """At most a rounding away from fp32, whatever computes the products with keys."""
    query, key, value = _states(heads, dtype, size_first)
    seen = torch.arange(COLUMNS) >= torch.tensor([0, 3, 9])[:rows, None]
    mask = seen[:, None, None] if rows else None
    module = torch.nn.Module()
    for attention in (decode.decode_attention, decode.matmul_decode):
        output, _ = attention(module, query, key, value, mask, 0.3)
        assert output.shape == (3, 1, heads[0], SIZE)
        _assert_attention(output, query, key, value, mask, 0.3)
    output, _ = decode.decode_attention(module, query, key, value, mask)
    _assert_attention(output, query, key, value, mask, SIZE**-0.5)


@LAYOUTS
@torch.no_grad()
def test_parts_that_are_no_table_of_rows(size_first: bool) -> None:
    """Some of the rows or heads of a buffer, values as projected, or of another size than keys."""
    module = torch.nn.Module()
    query, key, value = _states((4, 2), torch.float32, size_first)
    projected = torch.randn(3, COLUMNS, 2, SIZE).transpose(1, 2)
    for q, k, v in (
        (query[1:], key[1:], value[1:]),
        (query[:, :2], key[:, 1:], value[:, 1:]),
        (query, projected, projected),
        (query, key, value[..., :7]),
        (query, key, torch.randn(3, 2, COLUMNS, 5)),
        (query, key[:1].expand(3, -1, -1, -1), value[:1].expand(3, -1, -1, -1)),
    ):
        output, _ = decode.decode_attention(module, q, k, v, None, 0.3)
        _assert_attention(output, q, k, v, None, 0.3)


def test_gradients_flow() -> None:
    query, key, value = (t.clone().requires_grad_() for t in _states((4, 2), torch.float32, False))
    output, _ = decode.decode_attention(torch.nn.Module(), query, key, value, None)
    output.sum().backward()
    assert all(states.grad is not None for states in (query, key, value))


def _ways(monkeypatch: pytest.MonkeyPatch, query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """The functions that an attention calls."""
    called: list[str] = []

    def noted(name: str, real: Callable[..., Tensor], *args: Any) -> Tensor:
        called.append(name)
        return real(*args)

    for name in ("bag_logits", "matmul_logits", "bag_output", "matmul_output"):
        monkeypatch.setattr(decode, name, partial(noted, name, getattr(decode, name)))
    with torch.no_grad():
        decode.decode_attention(torch.nn.Module(), query, key, value, None)
    return called


@HEADS
@DTYPES
def test_the_rule(
    heads: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which functions read keys, in the layout that was chosen for them, and values."""
    like = torch.empty(3, heads[1], 1, SIZE, dtype=dtype)
    assert decode.wants_size_first(like) == (dtype != torch.float32)
    states = _states(heads, dtype, decode.wants_size_first(like))
    keys = "matmul_logits" if dtype == torch.float32 else "bag_logits"
    assert _ways(monkeypatch, *states) == [keys, "bag_output"]


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    assert decode.applies(query, {})
    assert decode.applies(query.float(), {})
    assert not decode.applies(query.double(), {})
    assert not decode.applies(query.to("meta"), {})
    assert not decode.applies(query.expand(1, 4, 2, 8), {})
    for name in ("dropout", "softcap", "position_bias", "s_aux"):
        assert not decode.applies(query, {name: 0.5})
    monkeypatch.setattr(decode, "_FBGEMM", False)
    assert not decode.applies(query, {})
    assert not decode.wants_size_first(query)


def test_trimmed_passes_on_cuda_do_without_kernels_that_are_planned() -> None:
    """torch's switch is back behind the pass, also where that breaks off; it is not touched by
    passes of which nothing is changed, or elsewhere than on CUDA."""
    cuda, seen = torch.backends.cuda, []

    def forward(**kwargs: Any) -> None:
        seen.append(cuda.cudnn_sdp_enabled())
        if kwargs.get("fails"):
            raise KeyError("broken off")

    session = SimpleNamespace(current=object())
    run = on_unplanned_kernels(forward, session)  # type: ignore[arg-type]
    on_cuda, on_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    before = cuda.cudnn_sdp_enabled()
    assert before
    run(inputs_embeds=on_cuda)
    with pytest.raises(KeyError):
        run(inputs_embeds=on_cuda, fails=True)
    assert cuda.cudnn_sdp_enabled()
    run(inputs_embeds=on_cpu)
    session.current = None
    run(inputs_embeds=on_cuda)
    assert seen == [False, False, True, True]
