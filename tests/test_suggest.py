"""A suggestion follows from the curves: each rule on curves drawn by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

import st3
from st3.tools.see import Suggestion, lazy_layers, suggest
from st3.tools.see.result import Analysis, Phase

LAYERS = 8


def phase(visual: list[float], holds: int, cosine: list[float] | None = None) -> Phase:
    """Curves of a model whose layers share their kept sets wholly up to ``holds`` apart, and not at
    all beyond."""
    count = len(visual)
    overlap = [[float(abs(i - j) <= holds) for j in range(count)] for i in range(count)]
    return Phase(
        shares=[[share, 0.0, 1 - share, 0.0] for share in visual],
        cosine=overlap,
        previous_cosine=cosine or [0.0] * count,
        previous_js=[0.0] * count,
        high=[1.0] * count,
        holding=[1.0] * count,
        overlap=overlap,
    )


def analysis(
    visual: list[float],
    holds: int = 2,
    over_time: list[float] | None = None,
    decode: Phase | None = None,
) -> Analysis:
    empty: list[list[float]] = [[1.0] * 12 for _ in visual]
    times = over_time or []
    return Analysis(
        prompts=1,
        decode_steps=len(times),
        visual_tokens=16,
        keep=0.25,
        prefill=phase(visual, holds),
        decode=decode,
        placed=False,
        rows=empty,
        columns=empty,
        lengths=[10.0 * (i + 1) for i in range(len(times))],
        shares_by_length=[[share, 0.0, 1 - share, 0.0] for share in times],
        visual_by_length=[[share] * len(visual) for share in times],
        same_as_first=[],
        same_as_before=[],
        longest=10 * len(times),
    )


FALLS_AT_3 = [0.4, 0.6, 0.6, *[0.25] * 5]


def of(**curves: Any) -> Suggestion:
    return suggest(analysis(**curves))


def test_the_first_layer_is_where_attention_on_the_image_has_halved() -> None:
    assert of(visual=FALLS_AT_3).first_layer == 3
    assert of(visual=[0.6, 0.2, *[0.1] * 6]).first_layer == 1
    later = of(visual=[0.5, 0.5, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2])
    assert later.first_layer == 5
    assert "up to 50%" in later.reasons[0]
    assert not later.cautions


def test_where_it_does_not_fall_the_ranking_decides_and_a_caution_stands() -> None:
    even = analysis(visual=[0.3] * LAYERS, holds=0)
    even.prefill.overlap[1][2:] = [0.9] * 6  # layer 1 ranks as the deeper ones do
    found = suggest(even)
    assert found.first_layer == 2
    assert "does not fall off" in found.cautions[0]


def test_a_ranking_that_no_deeper_layer_shares_is_cautioned() -> None:
    found = of(visual=FALLS_AT_3, holds=0)
    assert found.first_layer == 3
    assert "agrees little" in found.cautions[0]


@pytest.mark.parametrize(("holds", "stride"), [(0, 1), (1, 1), (2, 2), (4, 4), (7, 5)])
def test_the_stride_is_how_far_a_kept_set_holds(holds: int, stride: int) -> None:
    found = of(visual=FALLS_AT_3, holds=holds)
    assert found.stride == stride
    assert f"Stride {stride}" in found.reasons[1]


def test_the_horizon_is_behind_the_last_layer_that_looks() -> None:
    assert of(visual=FALLS_AT_3).horizon is None
    assert of(visual=[0.6, 0.5, 0.3, 0.06, 0.04, 0.01, 0.01, 0.04]).horizon == 4
    assert of(visual=[0.6, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.05]).horizon is None


def test_tau_puts_the_half_of_the_cosine_where_attention_has_halved() -> None:
    halves = of(visual=FALLS_AT_3, over_time=[0.4, 0.4, 0.4, 0.1, 0.1, 0.1])  # smooth: at 40
    assert halves.tau == math.ceil(1.5 * 40)
    policy = st3.methods.policies.parse(halves.policy)
    assert policy == st3.Balanced(first_layer=3, stride=2, anneal=st3.Anneal(tau=60))
    slowly = of(visual=FALLS_AT_3, over_time=[0.4, 0.35, 0.3, 0.3, 0.25])
    assert slowly.tau == math.ceil(1.5 * 50)
    assert "Tau 75 or more" in slowly.reasons[3]


def test_attention_that_stays_is_not_annealed() -> None:
    for found in (of(visual=FALLS_AT_3, over_time=[0.4] * 5), of(visual=FALLS_AT_3)):
        assert found.tau is None
        assert not st3.methods.policies.parse(found.policy).schedule(LAYERS).anneals


def test_decode_steps_are_what_counts_where_there_are_any() -> None:
    cosine = [0, 0.9, 0.5, 0.95, *[0.0] * 4]
    decode = phase([0.5, 0.5, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2], 2, cosine)
    both = analysis(visual=FALLS_AT_3, over_time=[0.4] * 3, decode=decode)
    assert suggest(both).first_layer == 5
    assert lazy_layers(both) == [1, 3]


def test_two_layers_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least three decoder layers"):
        of(visual=[0.5, 0.1])
