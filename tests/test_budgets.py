"""Every method at a mean share of the visual tokens."""

from __future__ import annotations

import pytest

from st3.methods.policies import available, parse

BUDGETED = [name for name in available() if name != "none"]


@pytest.mark.parametrize("layers", [16, 32])
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_for_every_method(name: str, layers: int) -> None:
    policy = parse(name).at_budget(layers, 0.35)
    schedule = policy.schedule(layers)
    share = schedule.mean_share
    if name == "dycoke":
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
