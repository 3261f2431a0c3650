"""Every method at a mean share of the visual tokens."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import st3
from st3.methods.policies import available, parse, read_budget, with_budget
from tests.helpers import Case

BUDGETED = [name for name in available() if name != "none"]


@pytest.mark.parametrize("layers", [16, 32])
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_for_every_method(name: str, layers: int) -> None:
    policy = parse(name).at_budget(layers, 0.35)
    schedule = policy.schedule(layers)
    share = schedule.mean_share
    if name in ("dycoke", "evict"):
        share = schedule.mean_visible(100_000, 1)
    within = 0.5 / layers if name == "vtw" else 1e-4  # VTW has whole layers only
    assert share == pytest.approx(0.35, abs=within)
    assert parse(str(policy)) == policy
    again = parse(name).at_budget(layers, 0.35)
    assert again == policy


def test_a_budget_leaves_the_other_arguments() -> None:
    assert parse("fastv:layer=4,score=dart").at_budget(32, 0.5) == parse(
        "fastv:layer=4,score=dart,drop=0.571428571429"
    )
    assert parse("st3:stride=2,recall_every=4").at_budget(32, 0.3).recalls
    assert parse("random:like=vtw,seed=2").at_budget(32, 0.5) == parse(
        "random:like=(vtw:layer=16),seed=2"
    )


@pytest.mark.parametrize(
    ("text", "share", "message"),
    [
        ("fastv:layer=8", 0.2, "Use a smaller layer"),
        ("sparsevlm", 0.05, "Use a smaller layers"),
        ("pyramiddrop", 0.1, "more stages"),
        ("divprune", 1.5, "between 0 and 1"),
        ("none", 0.5, "always 100 %"),
    ],
)
def test_budgets_that_cannot_be_had(text: str, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text).at_budget(32, share)


# -- a budget as an argument --------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_in_a_string(name: str) -> None:
    """It is found once the layers are known, and is all but the counts of the policy itself."""
    policy = parse(f"{name}:budget=0.35")
    at_budget = parse(name).at_budget(16, 0.35)
    assert policy == parse(name, budget=0.35) == parse(f"{name}:budget=35%")
    assert policy.schedule(16) == at_budget.schedule(16)
    assert with_budget(policy, 16) == with_budget(parse(name), 16, 0.35) == at_budget
    of_counts = [getattr(parse(name).scorer(), part, None) for part in ("keep", "above")]
    if of_counts == [None, None]:
        assert policy.scorer() == at_budget.scorer()
    else:  # it depends on how many tokens stay
        with pytest.raises(ValueError, match=r"see with_budget\(\)"):
            policy.scorer()
    assert (policy.rerank, policy.recalls) == (at_budget.rerank, at_budget.recalls)
    assert parse(str(policy)) == policy
    assert policy.at_budget(16, 0.5) == parse(name).at_budget(16, 0.5)


def test_budgets_and_other_arguments() -> None:
    policy = parse("fastv:budget=0.5,layer=4", score="dart")
    assert str(policy) == "fastv:layer=4,score=dart,budget=0.5"
    assert policy == parse(parse("fastv:score=dart", budget="50%"), layer=4)
    assert parse(policy, budget=0.6) == parse("fastv:layer=4,score=dart,budget=0.6")
    half = parse("fastv:budget=0.5").schedule(8)
    assert parse("random:like=(fastv:budget=0.5)").schedule(8) == half
    assert with_budget(parse("fastv"), 8) == parse("fastv")


def test_a_trimmer_at_a_budget() -> None:
    case = Case.of("llava")
    trimmer = st3.trim(case.model, budget=0.5)
    assert trimmer.schedule.mean_share == pytest.approx(0.5, abs=1e-4)
    assert trimmer.policy == st3.Thirds().at_budget(case.layers, 0.5)
    logits, report = case.prefill(parse("dart:budget=0.4"))
    wanted, other = case.prefill(st3.DART().at_budget(case.layers, 0.4))
    assert torch.equal(logits, wanted)
    assert report.policy == other.policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("st3:budget=1.2", "budget 1.2 is no share"),
        ("st3:budget=120%", "budget 120% is no share"),
        ("st3:budget=half", "write 35% or 0.35"),
        ("st3:budget=5%%", "write 35% or 0.35"),
        ("st3:budget=-5%", "budget -5% is no share"),
    ],
)
def test_bad_budgets(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_one_function_reads_every_budget() -> None:
    for given in ("35%", "0.35", " 35 % ", 0.35, Fraction(7, 20)):
        assert read_budget(given) == pytest.approx(0.35, abs=1e-12)
    assert read_budget(1) == 1.0
    for bad in (35, "35", True, None, float("nan"), "nan", "", "%", [0.3], "9" * 5000):
        with pytest.raises(ValueError, match=r"^budget .{,50} is no share") as failed:
            read_budget(bad)
        assert len(str(failed.value)) < 120


def test_a_budget_that_the_model_cannot_have() -> None:
    with pytest.raises(ValueError, match="cannot be had"):
        st3.trim(Case.of("llava").model, "fastv:layer=4", budget=0.1)
