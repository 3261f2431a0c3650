"""Attention masks: none wherever none is needed, and the right ones elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import st3
from st3.engine import masks
from st3.engine.steps import TextStep
from tests.helpers import POLICIES, ST3, Case, parts
from tests.test_modes import SOLO
from tests.zoo import I, T

RAGGED: list[list[Any]] = [[T(5), I(), T(4)], [T(3), I(), T(9)], [T(7)]]
FIRST = ST3.schedule(8).shares.index(ST3.schedule(8).shares[3])  # first layer that drops


@contextmanager
def attention_arguments(case: Case) -> Iterator[list[list[dict[str, Any]]]]:
    """What each layer's attention is called with: passes[i][layer]."""
    passes: list[list[dict[str, Any]]] = []

    def hook(index: int) -> Any:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index == 0:
                passes.append([])
            passes[-1].append({"hidden": args[0] if args else kwargs["hidden_states"], **kwargs})

        return note

    _, layers = parts(case.model)
    handles = [
        layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "gemma3", "mistral3"])
@pytest.mark.parametrize("rows", [SOLO, RAGGED], ids=["solo", "ragged"])
def test_trimmed_layers_get_no_position_ids(name: str, rows: Any) -> None:
    """Flash attention takes jumps in them for the borders of packed sequences. A single token's ids
    have none: a decode step whose layers need no mask leaves its inputs as they are."""
    case = Case.of(name, rows)
    with attention_arguments(case) as passes:
        case.generate(ST3, 4)
    assert len(passes) == 4
    for layer, seen in enumerate(passes[0]):
        assert (seen.get("position_ids") is None) == (layer >= FIRST) or "position_ids" not in seen
        if layer >= FIRST:
            assert seen.get("position_ids") is None
    for seen in chain.from_iterable(passes[1:]):
        ids = seen.get("position_ids")
        assert ids is None or (rows is SOLO and ids.shape[-1] == 1)


def test_flash_attention_gets_no_position_ids_in_a_step() -> None:
    step: Any = SimpleNamespace(plan=SimpleNamespace(kind="flash"), _unmasked={0: True})
    assert not TextStep.leaves(step, 0)
    step.plan.kind = "sdpa"
    assert TextStep.leaves(step, 0)
    assert not TextStep.leaves(step, 1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "mistral3", "internvl"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_ragged_rows_need_no_mask_once_they_are_trimmed(name: str, padding: str) -> None:
    case = Case.of(name, RAGGED, padding=padding)
    with attention_arguments(case) as passes:
        case.prefill(ST3)
    for layer, seen in enumerate(passes[0]):
        assert (seen["attention_mask"] is None) == (layer >= FIRST)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_masks_that_say_more_than_causal_are_kept(name: str) -> None:
    case = Case.of(name, RAGGED)
    with attention_arguments(case) as passes:
        case.prefill(ST3)
    for seen in passes[0]:
        columns = seen["hidden"].shape[1]
        assert seen["attention_mask"].shape[-2:] == (columns, columns)


def test_layers_of_a_kind_share_one_gathered_mask() -> None:
    """Gemma 3 has two kinds of masks: each is gathered once after each pruning, not per layer."""
    case = Case.of("gemma3", RAGGED)
    with attention_arguments(case) as passes:
        case.prefill(POLICIES["fastv"])
    later = [id(seen["attention_mask"]) for seen in passes[0][2:]]
    kinds = case.model.config.text_config.layer_types[2:]
    assert len(set(later)) == len(set(kinds)) == 2
    assert len(set(zip(later, kinds, strict=True))) == 2


def test_decoding_needs_no_mask_where_all_rows_start_together() -> None:
    with attention_arguments(case := Case.of("llava", [[T(5), I(), T(4)]] * 3)) as passes:
        case.generate(ST3, 6)
    assert all(seen["attention_mask"] is None for seen in chain(*passes[1:]))


def test_decoding_masks_only_what_a_row_does_not_see() -> None:
    case = Case.of("llava", RAGGED)
    with attention_arguments(case) as passes:
        out = case.generate(ST3, 6)
    schedule = case.schedule(ST3)
    for step, layers in enumerate(passes[1:], 1):
        for layer, seen in enumerate(layers):
            counts = seen["attention_mask"][:, 0, 0].sum(1).tolist()
            images = case.visual.sum(1).tolist()
            text = (case.valid & ~case.visual).sum(1).tolist()
            assert counts == [
                words + schedule.visible(layer, n, step) + step
                for words, n in zip(text, images, strict=True)
            ]
    assert out.sequences.shape == (3, case.width + 6)


@pytest.mark.parametrize("rows", [SOLO, RAGGED], ids=["solo", "ragged"])
def test_trimmed_prefill_layers_run_the_causal_kernel(
    rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sdpa is called with is_causal and without a mask in every layer from the first drop on."""
    case = Case.of("llava", rows)
    calls: list[tuple[int, bool, bool]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((query.shape[1], kwargs["is_causal"], kwargs["attn_mask"] is None))
        return sdpa(query, *args, **kwargs)

    with st3.trim(case.model, ST3), torch.no_grad():
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        case.model(**case.batch)
    heads = case.model.config.text_config.num_attention_heads
    text = [(causal, bare) for h, causal, bare in calls if h == heads]
    assert len(text) == 8
    assert text[FIRST:] == [(True, True)] * (8 - FIRST)


# -- the functions ------------------------------------------------------------------------------


def test_causal_aligns_the_last_query_with_the_last_key() -> None:
    assert masks.causal(2, 4, torch.device("cpu")).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]


def decode_mask(starts: Any, first: int, end: int, kind: Any) -> Tensor | None:
    return masks.decode_mask(starts, first, end, kind, torch.float32, torch.device("cpu"), {})


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_decode_mask_shows_each_query_its_rows_run(kind: Any) -> None:
    starts = [(3, 5), (4, 5), (4, 7)]  # of queries in columns 9, 10 and 11, for two rows
    mask = decode_mask(starts, 3, 12, kind)
    assert mask is not None
    assert mask.shape == (2, 1, 3, 9)
    seen = masks.as_bool(mask)
    for row in range(2):
        for query in range(3):
            wanted = [starts[query][row] <= column <= 9 + query for column in range(3, 12)]
            assert seen[row, 0, query].tolist() == wanted


def test_decode_mask_is_none_for_one_query_that_sees_all() -> None:
    assert decode_mask([(3, 3)], 3, 12, "sdpa") is None
    assert decode_mask([(3, 4)], 3, 12, "sdpa") is not None


def test_decode_masks_of_other_columns_are_not_mixed_up() -> None:
    """What is remembered between layers and steps is the rows' distance alone."""
    known: dict[Any, Tensor] = {}
    device = torch.device("cpu")
    for starts, first in (([(3, 5)], 3), ([(4, 6)], 4), ([(4, 6)], 3), ([(3, 6)], 3)):
        mask = masks.decode_mask(starts, first, 9, "sdpa", torch.float32, device, known)
        assert mask is not None
        wanted = [[column >= start for column in range(first, 9)] for start in starts[0]]
        assert mask[:, 0, 0].tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_gathered_masks_keep_rows_columns_and_kind(dtype: torch.dtype) -> None:
    seen = masks.causal(5, 5, torch.device("cpu"))[None, None].repeat(2, 1, 1, 1)
    seen[1, :, :, 0] = False
    mask = seen if dtype == torch.bool else masks.finish(seen, "eager", dtype)
    index = torch.tensor([[0, 2, 4], [1, 2, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    got = masks.gather_mask(mask, index, valid)
    assert got.dtype == dtype
    for row in range(2):
        for q in range(3):
            for k in range(3):
                wanted = seen[row, 0, index[row, q], index[row, k]] & valid[row, k]
                assert masks.as_bool(got)[row, 0, q, k] == wanted


def test_plain_masks_are_told_from_others() -> None:
    valid = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    plain = masks.causal(4, 4, torch.device("cpu")) & valid.bool()[:, None, None, :]
    assert masks.is_plain(plain, valid)
    assert masks.is_plain(masks.finish(plain, "eager", torch.float32), valid)
    open_ = plain.clone()
    open_[1, 0, 0, 0] = True  # what a padding query sees is nobody's business
    assert masks.is_plain(open_, valid)
    both_ways = plain.clone()
    both_ways[0, 0, 1, 2] = True
    assert not masks.is_plain(both_ways, valid)
    window = plain.clone()
    window[0, 0, 3, 0] = False
    assert not masks.is_plain(window, valid)
    assert not masks.is_plain(plain, None)
    assert masks.is_plain(masks.causal(4, 4, torch.device("cpu"))[None, None], None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sdpa", "sdpa"), ("eager", "eager"), ("flash_attention_2", "flash")],
)
def test_kinds_of_masks(name: str, kind: str) -> None:
    assert masks.kind_of(name) == kind


def test_flash_attention_gets_a_row_of_keys() -> None:
    mask = decode_mask([(3, 5)], 3, 8, "flash")
    assert mask is not None
    assert mask.tolist() == [[True] * 5, [False, False, True, True, True]]


def test_flash_attention_is_told_what_the_last_of_several_queries_sees() -> None:
    """It hides later keys from earlier queries itself."""
    mask = decode_mask([(3, 5), (3, 5)], 3, 8, "flash")
    assert mask is not None
    assert mask.tolist() == [[True] * 5, [False, False, True, True, True]]
