"""Properties that hold for all schedules, prompts and batches, on drawn examples."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import st3
from st3.engine.prompt import Block, Rows, read_prompt
from st3.engine.select import cache_order, rank_visual, select
from st3.methods.schedule import Schedule, exact
from tests.helpers import Case
from tests.zoo import I, T

percent = st.integers(0, 100).map(lambda n: Fraction(n, 100))
anneals = st.builds(
    st3.Anneal,
    st.sampled_from(["cosine", "half_cosine", "linear", "exponential", "none"]),
    st.integers(1, 300),
    st.integers(0, 100).map(lambda n: n / 100),
)


@st.composite
def st3_policies(draw: Any) -> tuple[st3.ST3, int]:
    """An ST3 policy and a number of layers that it fits."""
    layers = draw(st.integers(8, 80))
    first = draw(st.integers(1, layers - 2))
    stride = draw(st.integers(1, layers - first - 1))
    drop = draw(st.integers(0, 100))
    final = draw(st.integers(0, 100 - drop))
    policy = st3.ST3(
        first_layer=first,
        first_drop=drop / 100,
        final_keep=final / 100,
        stride=stride,
        anneal=draw(anneals),
    )
    return policy, layers


@given(st3_policies())
def test_equation_9_is_exact(drawn: tuple[st3.ST3, int]) -> None:
    """C = 1 - P - R * floor((L - first) / S), and share i = 1 - P - R * floor((i - first) / S)."""
    policy, layers = drawn
    first, stride = policy.first_layer, policy.stride
    p, c = exact(policy.first_drop), exact(policy.final_keep)
    ratio = policy.ratio_for(layers)
    assert c == 1 - p - ratio * ((layers - first) // stride)
    shares = policy.schedule(layers).shares
    assert shares[:first] == (1,) * first
    for layer in range(first, layers):
        assert shares[layer] == 1 - p - ratio * ((layer - first) // stride)
    corner = (layers - first) % stride == 0
    assert shares[-1] == (c + ratio if corner else c)


@given(st3_policies(), st.integers(0, 3000))
def test_counts_fall_with_depth_and_time(drawn: tuple[st3.ST3, int], n_visual: int) -> None:
    policy, layers = drawn
    schedule = policy.schedule(layers)
    kept = [schedule.kept(layer, n_visual) for layer in range(layers)]
    assert kept[0] == n_visual
    assert all(0 <= low <= high for high, low in pairwise(kept))
    for layer in {0, policy.first_layer, layers - 1}:
        steps = [0, 1, 2, 5, 17, 60, 150, 299, 300, 10**6]
        seen = [schedule.visible(layer, n_visual, step) for step in steps]
        assert seen[0] == kept[layer]
        assert all(0 <= low <= high for high, low in pairwise(seen))
    assert schedule.visible(0, n_visual, 9) >= schedule.visible(layers - 1, n_visual, 9)


@given(st.lists(percent, min_size=1, max_size=40), anneals, st.integers(0, 2000))
def test_any_falling_shares_make_a_schedule(
    shares: list[Fraction], anneal: st3.Anneal, n_visual: int
) -> None:
    schedule = Schedule(tuple(sorted(shares, reverse=True)), anneal)
    for layer, share in enumerate(schedule.shares):
        assert abs(schedule.kept(layer, n_visual) - share * n_visual) <= Fraction(1, 2)
        assert schedule.prunes(layer) == (share < (schedule.shares[layer - 1] if layer else 1))
        low = schedule.visible(layer, n_visual, 10**6)
        floor = round(exact(anneal.floor) * n_visual)
        assert low >= min(schedule.kept(layer, n_visual), floor - 1) or anneal.curve == "none"
    assert 0 <= schedule.mean_visible(n_visual, 3) <= schedule.mean_share + 0.5


@given(st.integers(8, 80), st.integers(0, 100))
def test_at_budget_hits_any_mean_that_can_be_had(layers: int, mean: int) -> None:
    assume(mean / 100 * layers >= 1)
    schedule = st3.Balanced().at_budget(layers, mean / 100).schedule(layers)
    assert abs(schedule.mean_share - mean / 100) < 1e-9


@given(st3_policies())
def test_policies_read_back_from_their_strings(drawn: tuple[st3.ST3, int]) -> None:
    policy, _ = drawn
    read = st3.methods.policies.parse(str(policy))
    if policy.anneal.curve == "none":
        assert read.anneal.curve == "none"  # type: ignore[attr-defined]
    else:
        assert read == policy


# -- columns ------------------------------------------------------------------------------------


@st.composite
def batches(draw: Any) -> tuple[Tensor, Tensor, bool]:
    """Visual tokens and mask [B, T], padded left or right, and whether budgets are per image."""
    rows = draw(st.integers(1, 4))
    texts = [
        draw(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=6))
        for _ in range(rows)
    ]
    lines = [[visual for visual, n in parts for _ in range(n)] + [False] for parts in texts]
    width = max(map(len, lines))
    left = draw(st.booleans())
    visual = torch.zeros(rows, width, dtype=torch.bool)
    mask = torch.zeros(rows, width, dtype=torch.long)
    for row, line in enumerate(lines):
        start = width - len(line) if left else 0
        visual[row, start : start + len(line)] = torch.tensor(line)
        mask[row, start : start + len(line)] = 1
    assume(bool(visual.any()))
    return visual, mask, draw(st.booleans())


def budgets(rows: Rows, per_image: bool) -> tuple[tuple[int, ...], ...]:
    return rows.images if per_image else tuple((n,) for n in rows.n_visual)


@given(batches(), st.integers(0, 10**6))
def test_selection_keeps_all_text_and_the_best_of_each_budget(drawn: Any, seed: int) -> None:
    visual, mask, per_image = drawn
    rows, block = read_prompt(visual, mask, 0, per_image)
    assert rows.n_visual == tuple(visual.sum(1).tolist())
    assert rows.n_text == tuple((mask.sum(1) - visual.sum(1)).tolist())
    score = torch.rand(visual.shape, generator=torch.Generator().manual_seed(seed))
    for share in (Fraction(2, 3), Fraction(1, 3), Fraction(0)):
        before = block
        kept = [[int(n * share) for n in row] for row in budgets(rows, per_image)]
        here_score = score.gather(1, before.source_columns())
        block, _ = select(before, here_score, kept)
        index = block.source_columns()
        for row in range(len(visual)):
            count = block.counts[row]
            here = index[row, :count]
            if block.valid is not None:
                # Rows are left-aligned: what is valid is one run from the first column on.
                assert block.valid[row].tolist() == [i < count for i in range(index.shape[1])]
            else:
                assert count == index.shape[1]
            assert (here.diff() > 0).all()  # in the prompt's order
            assert torch.equal(block.visual[row, :count], visual[row, here])
            text = (mask[row].bool() & ~visual[row]).nonzero().flatten()
            assert set(text.tolist()) <= set(here.tolist())
            assert int(block.visual[row].sum()) == sum(kept[row])
            assert block.last[row] == count - 1
            assert index[row, block.last[row]] == text[-1]
            ordinal = (visual[row].cumsum(0) - 1)[here]
            seen = block.visual[row, :count]
            assert torch.equal(block.ordinal[row, :count][seen], ordinal[seen])
            check_best(before, block, here_score, row, kept[row])


def check_best(before: Block, after: Block, score: Tensor, row: int, kept: list[int]) -> None:
    """In each budget no dropped token has a higher score than a kept one."""
    old = before.source_columns()[row]
    stays = set(after.source_columns()[row, : after.counts[row]].tolist())
    group = torch.zeros_like(old) if before.group is None else before.group[row]
    for number, count in enumerate(kept):
        here = before.visual[row] & (group == number)
        chosen = torch.tensor([int(column) in stays for column in old]) & here
        assert int(chosen.sum()) == count
        if count and bool((here & ~chosen).any()):
            assert score[row, chosen].min() >= score[row, here & ~chosen].max()


@given(batches(), anneals, st.integers(0, 10**6))
def test_cache_order_is_padding_then_rising_importance_then_text(
    drawn: Any, anneal: st3.Anneal, seed: int
) -> None:
    """Whatever the step: the visible entries of a row are those that its budgets' own curves
    leave, and they are one run up to the end."""
    visual, mask, per_image = drawn
    rows, block = read_prompt(visual, mask, 0, per_image)
    share = Fraction(2, 3)
    schedule = Schedule((share,), anneal)
    score = torch.rand(visual.shape, generator=torch.Generator().manual_seed(seed))
    kept = [[schedule.kept(0, n) for n in row] for row in budgets(rows, per_image)]
    block, columns = select(block, score, kept)
    score = score.gather(1, columns)
    late = [[schedule.visible(0, n, 10**9) for n in row] for row in budgets(rows, per_image)]
    order = cache_order(block, score, late)
    assert order is not None
    rank = rank_visual(block, score)
    for row in range(len(visual)):
        count, line = block.counts[row], order[row]
        live = line[len(line) - count :].tolist()
        assert sorted(live) == list(range(count))
        n_kept = sum(kept[row])
        assert block.visual[row, live[:n_kept]].all()
        text = live[n_kept:]
        assert text == sorted(text)
        group = torch.zeros_like(rank[row]) if block.group is None else block.group[row]
        for step in (0, 1, 3, 20, 100, 400):
            shown = [schedule.visible(0, n, step) for n in budgets(rows, per_image)[row]]
            wanted = {
                column
                for column in range(count)
                if block.visual[row, column] and rank[row, column] < shown[int(group[column])]
            }
            assert set(live[n_kept - sum(shown) : n_kept]) == wanted


# -- the whole engine ---------------------------------------------------------------------------

pieces = st.lists(
    st.one_of(st.integers(1, 6).map(T), st.builds(I, st.integers(1, 4), st.integers(2, 4))),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixtral", "qwen2_5_vl"])
# The same examples every time: among many, some have scores too close to call in fp32.
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(pieces, min_size=1, max_size=3),
    seed=st.integers(0, 50),
    first=st.integers(1, 6),
    stride=st.integers(1, 3),
    drop=st.integers(0, 9),
    anneal=anneals,
    padding=st.sampled_from(["left", "right"]),
)
def test_any_batch_and_policy_agree_with_the_reference(
    name: str, rows: Any, seed: int, first: int, stride: int, drop: int, anneal: Any, padding: str
) -> None:
    policy = st3.ST3(
        first_layer=first,
        first_drop=drop / 10,
        ratio=(1 - drop / 10) / 10,
        stride=stride,
        anneal=anneal,
    )
    batch = [[*row, T(2)] for row in rows]
    assume(any(isinstance(piece, I) for row in batch for piece in row))
    Case.of(name, batch, seed=seed % 3, padding=padding).check_prefill(policy)
    Case.of(name, batch, seed=seed % 3).check_generate(policy, 6)
