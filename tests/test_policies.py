"""Methods by name: strings, presets, the registry, and bad arguments."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import st3
from st3.methods.policies import available, parse, presets, register
from st3.methods.policies.registry import _POLICIES
from st3.methods.schedule import Schedule
from st3.methods.scores import SCORES, score_named
from tests.helpers import METHODS, POLICIES, SCORED, Case

PAPER_7B = st3.ST3(
    first_layer=3,
    first_drop=0.5,
    final_keep=0.01,
    stride=4,
    score="attention",
    anneal=st3.Anneal(tau=128),
)


def test_every_method_and_score_is_in_the_matrix() -> None:
    own = {cls for cls in available().values() if cls.__module__.startswith("st3.")}
    rows = {**POLICIES, **METHODS, **SCORED}.values()
    assert {type(policy) for policy in rows} == own
    scores = {type(score) for score in SCORES.values()}
    assert {type(policy.scorer()) for policy in rows} == {
        cls for cls in scores if cls.__module__.startswith("st3.")
    }


@pytest.mark.parametrize("name", [*POLICIES, *METHODS])
def test_strings_read_back(name: str) -> None:
    policy = {**POLICIES, **METHODS}[name]
    assert parse(str(policy)) == policy
    assert parse(policy) is policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("st3", st3.ST3()),
        (" st3 ", st3.ST3()),
        ("st3:", st3.ST3()),
        ("fastv:layer=3,drop=0.75", st3.FastV(layer=3, drop=0.75)),
        ("fastv: layer = 3 , drop = 0.75", st3.FastV(layer=3, drop=0.75)),
        ("vtw:layer=none", st3.VTW()),
        ("vtw:layer=4", st3.VTW(layer=4)),
        ("balanced", st3.Balanced()),
        ("st3:tau=64,floor=0.1,curve=linear", st3.ST3(anneal=st3.Anneal("linear", 64, 0.1))),
        ("st3:anneal=none", st3.ST3(anneal=st3.Anneal("none"))),
        ("st3:ratio=0.07,rerank_every=8", st3.ST3(ratio=0.07, rerank_every=8)),
        ("st3:score=key_norm", st3.ST3(score="key_norm")),
        ("st3-7b", PAPER_7B),
        ("st3-7b:stride=2", replace(PAPER_7B, stride=2)),
        ("st3-7b:floor=0.1", replace(PAPER_7B, anneal=st3.Anneal(tau=128, floor=0.1))),
        ("st3-7b:anneal=none", replace(PAPER_7B, anneal=st3.Anneal("none"))),
        ("random:like=fastv", st3.Random(like=st3.FastV())),
        (
            "random:like=(fastv:drop=0.75,layer=3),seed=4",
            st3.Random(like=st3.FastV(layer=3, drop=0.75), seed=4),
        ),
        ("none", st3.NoTrim()),
    ],
)
def test_strings(text: str, policy: st3.Policy) -> None:
    assert parse(text) == policy
    assert parse(str(policy)) == policy


def test_options_come_on_top_of_a_string() -> None:
    assert parse("fastv:layer=3", drop=0.9) == st3.FastV(layer=3, drop=0.9)
    assert parse(st3.FastV(layer=3), drop=0.9) == st3.FastV(layer=3, drop=0.9)
    trimmer = st3.trim(Case.of("llava").model, "st3", final_keep=0.01, stride=2)
    assert trimmer.policy == st3.ST3(final_keep=0.01, stride=2)


def test_annealing_options_come_on_top_of_a_string() -> None:
    """They are an Anneal's, but stand beside the policy's own; what is not given stays."""
    model, anneal = Case.of("llava").model, st3.Anneal(tau=64)
    assert st3.trim(model, "st3", tau=64).policy == st3.ST3(anneal=anneal)
    assert st3.trim(model, tau=64).policy == st3.Thirds(anneal=anneal)  # which turns it on
    assert parse("st3-7b:floor=0.1", tau=32).anneal == st3.Anneal(tau=32, floor=0.1)
    assert parse(st3.ST3(anneal=st3.Anneal("linear", 9)), floor=0.2) == st3.ST3(
        anneal=st3.Anneal("linear", 9, 0.2)
    )
    with pytest.raises(
        ValueError, match=r"has no argument 'tau': it takes layer, drop, score, budget$"
    ):
        parse(st3.FastV(), tau=3)
    with pytest.raises(
        ValueError, match=r"recall_every, score, per_head, curve, tau, floor, budget$"
    ):
        parse("st3", period=3)


def test_options_of_every_method_read_back_as_they_are_named() -> None:
    """Each argument that a message names is taken, as a string and as a keyword."""
    for name in available():
        try:
            parse(name, nothing=1)
        except ValueError as error:
            takes = str(error).rpartition("it takes ")[2]
        policy = parse(name)
        assert takes.endswith("budget")
        for key in takes.split(", ")[:-1]:
            owner = policy if hasattr(policy, key) else policy.anneal
            if owner is not policy and owner.curve == "none" and key != "curve":
                continue  # which turns annealing on
            assert parse(name, **{key: getattr(owner, key)}) == policy, (name, key)


def test_presets_are_the_papers() -> None:
    assert presets() == {"st3-7b": PAPER_7B, "st3-13b": replace(PAPER_7B, final_keep=0.05)}


def test_policies_are_frozen_and_comparable() -> None:
    policy = st3.ST3()
    with pytest.raises(FrozenInstanceError):
        policy.stride = 2  # type: ignore[misc]
    assert len({st3.ST3(), st3.ST3(), st3.FastV()}) == 2


@pytest.mark.parametrize("name", [cls.name for cls in available().values()])
def test_every_method_names_its_paper_and_explains_itself(name: str) -> None:
    cls = available()[name]
    assert cls.paper
    assert cls.__doc__
    assert parse(name).schedule(32).num_layers == 32


def test_a_method_of_ones_own() -> None:
    @register
    @dataclass(frozen=True)
    class Last(st3.Policy):
        """All visual tokens leave before the last layer."""

        name: ClassVar[str] = "last-only"

        def schedule(self, num_layers: int) -> Schedule:
            return Schedule((Fraction(1),) * (num_layers - 1) + (Fraction(0),))

    try:
        case = Case.of("llava")
        assert parse("last-only") == Last()
        case.check_prefill(Last())
        case.check_generate(Last(), 3)
    finally:
        del _POLICIES["last-only"]


# -- scores -------------------------------------------------------------------------------------


def places(count: int) -> Any:
    return SimpleNamespace(ordinal=torch.arange(count)[None])


def test_random_scores_depend_on_the_seed_and_the_place_alone() -> None:
    one = st3.Random(seed=1).scorer()(places(1000))
    assert torch.equal(one[:, :10], st3.Random(seed=1).scorer()(places(10)))
    assert not torch.equal(one, st3.Random(seed=2).scorer()(places(1000)))
    assert one.min() >= 0
    assert one.max() < 1
    assert abs(float(one.mean()) - 0.5) < 0.03
    assert len(one.unique()) == 1000


@pytest.mark.parametrize("keep", [16, 72, 288])
def test_uniform_scores_spread_the_kept_tokens(keep: int) -> None:
    scores = score_named("uniform")(places(576))[0]
    kept = scores.topk(keep).indices.sort().values
    gaps = kept.diff()
    assert gaps.max() <= 3 * 576 / keep


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_choices_of_neighbouring_seeds_share_no_more_than_chance(seed: int) -> None:
    first, second = (
        st3.Random(seed=s).scorer()(places(2000))[0].topk(500) for s in (seed, seed + 1)
    )
    common = len(set(first.indices.tolist()) & set(second.indices.tolist()))
    assert 85 < common < 165  # 125 expected


# -- bad arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("st4", "unknown policy 'st4': use one of"),
        ("", "unknown policy '': use one of"),
        ("FASTV:layer=2", "did you mean 'fastv'"),
        ("sts3", "did you mean 'st3'"),
        ("fastv:layers=2", "has no argument 'layers': it takes layer, drop, score"),
        ("fastv:tau=2", "has no argument 'tau': it takes layer, drop, score"),
        ("none:keep=1", "it takes budget$"),
        ("fastv:layer", "write name=value"),
        ("fastv:layer=", "write name=value"),
        ("fastv:layer=two", "layer must be a decoder layer counted from 0, got 'two'"),
        ("fastv:layer=2.5", "layer must be a decoder layer counted from 0, got 2.5"),
        ("fastv:drop=half", "drop must be a number between 0 and 1, got 'half'"),
        ("fastv:drop=nan", "drop must lie between 0 and 1"),
        ("fastv:drop=1.5", "drop must lie between 0 and 1"),
        ("st3:tau=inf", "tau must be a positive number of tokens, got inf"),
        ("st3:tau=soon", "tau must be a positive number of tokens, got 'soon'"),
        ("st3:curve=cos", "use one of cosine"),
        ("st3:score=looks", "unknown score 'looks': use one of attention"),
        ("random:like=what", "unknown policy 'what'"),
    ],
)
def test_bad_strings(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_policy_of_another_type() -> None:
    with pytest.raises(TypeError, match="a string such as 'st3'"):
        parse(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st3.ST3(first_layer=0), "at least 1: the score is read off the layer before"),
        (lambda: st3.ST3(first_layer=-1), "counted from 0"),
        (lambda: st3.ST3(first_layer=2.5), "counted from 0"),  # type: ignore[arg-type]
        (lambda: st3.ST3(first_drop=1.5), "first_drop must lie between 0 and 1"),
        (lambda: st3.Balanced(final_keep=0.6), "use at most 0.4"),
        (lambda: st3.ST3(final_keep="0.1"), "final_keep must be a number"),  # type: ignore[arg-type]
        (lambda: st3.ST3(stride=0), "stride must be a whole number of at least 1"),
        (lambda: st3.ST3(stride=2.0), "stride must be a whole number of at least 1"),
        (lambda: st3.ST3(ratio=2), "ratio must lie between 0 and 1"),
        (lambda: st3.ST3(rerank_every=0), "rerank_every must be a whole number of at least 1"),
        (lambda: st3.ST3(anneal="cosine"), "anneal must be an st3.Anneal"),  # type: ignore[arg-type]
        (lambda: st3.ST3(score="looks"), "use one of attention"),
        (lambda: st3.ST3(first_layer=3).schedule(3), "use at most 2"),
        (lambda: st3.Balanced(stride=40).schedule(32), "Use a smaller stride, or final_keep=0.4"),
        (lambda: st3.ST3(ratio=0.2).schedule(32), "Use a smaller ratio or a larger stride"),
        (lambda: st3.FastV(layer=0), "at least 1: FastV reads the attention of the layer before"),
        (lambda: st3.FastV(drop=-1), "drop must lie between 0 and 1"),
        (lambda: st3.FastV(layer=9).schedule(8), "use at most 7"),
        (lambda: st3.VTW(layer=0), "at least 1"),
        (lambda: st3.VTW(layer=8).schedule(8), "use at most 7"),
        (lambda: st3.VTW().schedule(1), "at least 2"),
        (lambda: st3.PyramidDrop(stages=1), "stages must be a whole number of at least 2"),
        (lambda: st3.PyramidDrop(stages=9).schedule(8), "use at most 8"),
        (lambda: st3.Random(like="st3"), "like must be an st3 policy"),  # type: ignore[arg-type]
        (lambda: st3.Random(seed=-1), "seed must be a whole number of at least 0"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
