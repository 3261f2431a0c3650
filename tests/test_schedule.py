"""How many: eq. 9 and the paper's settings, the curves, budgets, and bad numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

import st3
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import parse
from st3.methods.schedule import Schedule, exact, round_share
from st3.methods.scores import Attention
from tests.helpers import Case

CURVES = ["cosine", "half_cosine", "linear", "exponential", "none"]


def shares(policy: st3.Policy, layers: int) -> list[float]:
    return [float(share) for share in policy.schedule(layers).shares]


# -- the paper ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "layers", "ratio", "final"),
    [("st3-7b", 32, Fraction(7, 100), 0.01), ("st3-13b", 40, Fraction(5, 100), 0.05)],
)
def test_the_papers_settings(preset: str, layers: int, ratio: Fraction, final: float) -> None:
    policy = st3.methods.policies.parse(preset)
    assert isinstance(policy, st3.ST3)
    assert policy.ratio_for(layers) == ratio
    assert shares(policy, layers)[:4] == [1, 1, 1, 0.5]
    assert shares(policy, layers)[-1] == final


@pytest.mark.parametrize(("preset", "layers"), [("st3-7b", 32), ("st3-13b", 40)])
def test_st3_is_the_paper(preset: str, layers: int) -> None:
    """Half leaves at the 4th layer, by the last row's attention; eq. 9 down to 1 % or 5 %."""
    policy = st3.ST3()
    assert policy == parse("st3")
    assert policy.schedule(layers) == parse(preset).schedule(layers)
    assert policy.scorer() == Attention()
    assert policy.anneal.curve == "cosine"
    assert policy.rerank is None
    assert [policy.first_layer_for(layers), policy.stride_for(layers)] == [3, 4]


@pytest.mark.parametrize(
    ("layers", "first", "stride", "drops"),
    [(8, 1, 1, 7), (16, 2, 2, 7), (24, 2, 3, 7), (28, 3, 4, 6), (64, 6, 8, 7), (80, 8, 10, 7)],
)
def test_st3_stands_at_the_same_depth_of_other_models(
    layers: int, first: int, stride: int, drops: int
) -> None:
    policy = st3.ST3()
    assert policy.first_layer_for(layers) == first
    assert policy.stride_for(layers) == stride
    assert policy.drops_after_first(layers) == drops
    found = shares(policy, layers)
    assert found[first - 1 : first + 1] == [1, 0.5]
    assert policy.last_share_for(layers) == exact(0.01)
    corner = (layers - first) % stride == 0
    assert found[-1] == pytest.approx(0.01 + (policy.ratio_for(layers) if corner else 0))
    assert found == shares(st3.ST3(first_layer=first, stride=stride), layers)


def test_a_first_drop_that_leaves_less_than_the_papers_end() -> None:
    assert shares(st3.ST3(first_drop=0.995), 32)[-1] == 0.005


def test_the_default_is_thirds() -> None:
    """As chosen on the half to choose on: what st3.trim(model) and the commands take."""
    policy = parse(DEFAULT_POLICY)
    assert policy == st3.Thirds()
    assert (policy.keep, policy.later, policy.salient) == (0.5, 0.667, 0.667)
    assert (policy.window, policy.every) == (4, 4)
    assert shares(policy, 32)[0] == 0.5
    assert st3.trim(Case.of("llava").model).policy == policy


def test_the_settings_of_balanced() -> None:
    policy = st3.Balanced()
    assert (policy.first_layer, policy.stride, policy.score) == (1, 4, "mixed")
    assert policy.anneal == st3.Anneal("cosine", 256, 0.05)
    assert shares(policy, 32)[:2] == [1, 0.4]
    assert shares(policy, 32)[-1] == 0.24
    assert st3.Random().like == st3.Thirds()


def test_the_counts_of_llava_7b() -> None:
    schedule = parse("st3-7b").schedule(32)
    kept = [schedule.kept(layer, 576) for layer in range(32)]
    assert kept[:3] == [576] * 3
    # Half of 576, then 7 % of 576 less at every fourth layer; each rounded on its own.
    steps = [288, 248, 207, 167, 127, 86, 46, 6]
    assert kept[3:] == [count for count in steps for _ in range(4)][:29]
    assert 0.33 < schedule.mean_share < 0.38


def test_the_ratio_can_be_given_instead() -> None:
    by_ratio = parse("st3-7b:ratio=0.07").schedule(32)
    assert by_ratio.shares == parse("st3-7b").schedule(32).shares


def test_where_the_stride_divides_the_depth_the_last_layer_keeps_one_ratio_more() -> None:
    """Eq. 9 then counts a drop that would fall behind the last layer."""
    policy = st3.ST3(first_layer=3, first_drop=0.5, final_keep=0.1, stride=4)
    assert (11 - 3) % 4 == 0
    schedule = policy.schedule(11)
    ratio = policy.ratio_for(11)
    assert ratio == Fraction(1, 5)
    assert schedule.shares[-1] == Fraction(1, 10) + ratio
    assert policy.schedule(12).shares[-1] == Fraction(1, 10)


def test_fastv_drops_once() -> None:
    assert shares(st3.FastV(layer=2, drop=0.75), 6) == [1, 1, 0.25, 0.25, 0.25, 0.25]


def test_vtw_withdraws_half_way() -> None:
    assert shares(st3.VTW(), 6) == [1, 1, 1, 0, 0, 0]
    assert shares(st3.VTW(layer=5), 6) == [1, 1, 1, 1, 1, 0]


def test_pyramiddrop_halves_at_each_quarter() -> None:
    assert shares(st3.PyramidDrop(), 8) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_no_trim_keeps_all() -> None:
    schedule = st3.NoTrim().schedule(5)
    assert not schedule.drops
    assert shares(st3.NoTrim(), 5) == [1] * 5


def test_random_takes_the_counts_of_another() -> None:
    like = st3.FastV(drop=0.3)
    assert st3.Random(like=like).schedule(8) == like.schedule(8)


# -- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "count", "rounded"),
    [(0.5, 3, 2), (0.5, 576, 288), (0.07, 100, 7), (0.1, 4, 0), (0.1, 5, 1), (0, 9, 0), (1, 9, 9)],
)
def test_shares_are_rounded_half_up(share: float, count: int, rounded: int) -> None:
    assert round_share(exact(share), count) == rounded


def test_decimals_are_taken_as_they_are_written() -> None:
    assert exact(0.07) == Fraction(7, 100)
    assert exact(Fraction(1, 3)) == Fraction(1, 3)
    assert 1 - exact(0.5) - 7 * exact(0.07) == exact(0.01)


def test_mean_share_is_over_the_layers() -> None:
    assert Schedule.from_shares([1, 1, 0.5, 0.1]).mean_share == pytest.approx(0.65)


def test_prunes_names_the_layers_where_tokens_leave() -> None:
    schedule = Schedule.from_shares([0.9, 0.9, 0.5, 0.5, 0])
    assert [layer for layer in range(5) if schedule.prunes(layer)] == [0, 2, 4]


def test_drops_and_anneals() -> None:
    assert not Schedule.from_shares([1, 1]).drops
    assert Schedule.from_shares([1, 0.5]).drops
    assert Schedule.from_shares([1, 1], st3.Anneal()).drops
    assert not Schedule.from_shares([1, 1], st3.Anneal("none")).drops
    assert not Schedule.from_shares([0, 0], st3.Anneal()).anneals


# -- annealing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "at_half", "at_end"),
    [
        ("cosine", math.cos(math.pi / 4), 0),
        ("half_cosine", 0.5, 0),
        ("linear", 0.5, 0),
        ("exponential", math.exp(-0.5), math.exp(-1)),
        ("none", 1, 1),
    ],
)
def test_curves(curve: Any, at_half: float, at_end: float) -> None:
    anneal = st3.Anneal(curve, tau=20)
    assert anneal.factor(0) == 1
    assert anneal.factor(10) == pytest.approx(at_half)
    assert anneal.factor(20) == pytest.approx(at_end)
    assert anneal.factor(1000) == pytest.approx(0 if curve != "none" else 1, abs=1e-9)


def test_visible_follows_the_curve_down_to_the_floor() -> None:
    schedule = Schedule.from_shares([1, 0.5], st3.Anneal("linear", tau=10, floor=0.2))
    assert [schedule.visible(0, 100, step) for step in (0, 1, 5, 8, 9, 50)] == [
        100, 90, 50, 20, 20, 20,
    ]  # fmt: skip
    # The floor is a share of the ORIGINAL count.
    assert [schedule.visible(1, 100, step) for step in (0, 1, 5, 6, 7)] == [50, 45, 25, 20, 20]


def test_a_layer_that_has_less_than_the_floor_keeps_what_it_has() -> None:
    schedule = Schedule.from_shares([1, 0.1], st3.Anneal(tau=10, floor=0.2))
    assert [schedule.visible(1, 100, step) for step in (0, 5, 50)] == [10, 10, 10]


def test_mean_visible_counts_decode_steps() -> None:
    schedule = Schedule.from_shares([1, 0.5], st3.Anneal("linear", tau=4, floor=0))
    seen = [100, 50, 75, 38, 50, 25, 25, 13, 0, 0]
    assert schedule.mean_visible(100, 4) == pytest.approx(sum(seen[2:]) / 800)
    assert schedule.mean_visible(100, 0) == schedule.mean_share
    assert schedule.mean_visible(0, 4) == schedule.mean_share


def test_the_defaults_leave_an_image_to_a_long_description() -> None:
    """At token 300 no layer shows less than the floor, 5 % of the image, unless it has less."""
    schedule = st3.Balanced().schedule(32)
    for layer in range(32):
        assert schedule.visible(layer, 576, 300) == min(schedule.kept(layer, 576), 29)


# -- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [8, 12, 28, 32, 40, 80])
@pytest.mark.parametrize("mean", [0.38, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(
    "policy",
    [st3.Balanced(), st3.ST3(), parse("st3-7b"), st3.Balanced(first_drop=1, final_keep=0)],
)
def test_at_budget_hits_the_mean(policy: st3.Policy, layers: int, mean: float) -> None:
    schedule = policy.at_budget(layers, mean).schedule(layers)
    assert schedule.mean_share == pytest.approx(mean, abs=1e-9)
    counts = [schedule.kept(layer, 576) for layer in range(layers)]
    assert sum(counts) / layers / 576 == pytest.approx(mean, abs=0.5 / 576)


def test_budgets_keep_the_annealing_they_are_given() -> None:
    anneal = st3.Anneal("linear", tau=9)
    assert st3.ST3(anneal=anneal).at_budget(32, 0.5).anneal == anneal


@pytest.mark.parametrize("policy", [st3.Balanced(), st3.ST3(), parse("st3-7b")])
def test_budgets_keep_the_shape(policy: st3.Policy) -> None:
    """C is the same part of what the first drop leaves."""
    made = policy.at_budget(32, 0.25)
    parts = [p.last_share_for(32) / p.first_share for p in (policy, made)]
    assert float(parts[1]) == pytest.approx(float(parts[0]), rel=1e-9)


@pytest.mark.parametrize(
    ("layers", "mean", "message"),
    [
        (32, 0.02, "Use a smaller first_layer"),
        (32, 1.5, "between 0 and 1"),
        (1, 0.5, "use at most 0"),
        (32, math.nan, "between 0 and 1"),
    ],
)
def test_budgets_that_cannot_be_had(layers: int, mean: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st3.Balanced().at_budget(layers, mean)


# -- bad numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curve": "cosin"}, "use one of cosine, half_cosine"),
        ({"tau": 0}, "positive number of tokens"),
        ({"tau": -3}, "positive number of tokens"),
        ({"tau": math.nan}, "positive number of tokens"),
        ({"tau": "9"}, "positive number of tokens"),
        ({"tau": True}, "positive number of tokens"),
        ({"floor": -0.1}, "anneal floor must lie between 0 and 1"),
        ({"floor": 1.1}, "anneal floor must lie between 0 and 1"),
        ({"floor": "0.1"}, "anneal floor must be a number between 0 and 1"),
    ],
)
def test_bad_annealing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st3.Anneal(**arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one decoder layer"),
        ([1, 0.5, 0.6], "let the shares fall with depth"),
        ([1.2], "between 0 and 1"),
        ([1, -0.1], "between 0 and 1"),
    ],
)
def test_bad_shares(given: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_shares(given)
