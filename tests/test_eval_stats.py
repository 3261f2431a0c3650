"""Bootstrap intervals."""

from __future__ import annotations

import pytest
import torch

from st3.tools.eval.stats import Metric, metric, ratio


def flips(count: int, share: float, seed: int) -> list[tuple[float, float]]:
    rng = torch.Generator().manual_seed(seed)
    return [(float(x < share), 1.0) for x in torch.rand(count, generator=rng)]


def test_the_value_is_the_ratio_of_sums() -> None:
    one = metric([(1, 2), (3, 3)], ["a", "b"]).estimate()
    assert one.value == pytest.approx(4 / 5)
    assert one.low <= one.value <= one.high


def test_intervals_cover_the_truth() -> None:
    covered = 0
    for seed in range(60):
        one = metric(flips(100, 0.7, seed), [str(i) for i in range(100)]).estimate()
        covered += one.low <= 0.7 <= one.high
        assert 0.12 < one.high - one.low < 0.24  # 4 standard errors of a coin are 0.18
    assert covered >= 52


def test_images_are_drawn_as_a_whole() -> None:
    """Ten questions about one image are no ten draws: equal answers widen the interval."""
    rows = [pair for pair in flips(20, 0.5, 3) for _ in range(10)]
    alone = metric(rows, [str(i) for i in range(200)]).estimate()
    together = metric(rows, [str(i // 10) for i in range(200)]).estimate()
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_differences_are_paired() -> None:
    rows = flips(50, 0.6, 1)
    worse = [(0.0, 1.0), *rows[1:]] if rows[0][0] else [*rows[:-1], (0.0, 1.0)]
    names = [str(i) for i in range(50)]
    same = metric(rows, names).difference(metric(rows, names))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    less = metric(worse, names).difference(metric(rows, names))
    assert less.high <= 0
    assert less.high - less.low < 0.1  # of unpaired ones 0.27 or so
    with pytest.raises(ValueError, match="the same items"):
        metric(rows, names).difference(metric(rows[:3], names[:3]))


def test_figures_that_are_no_ratio() -> None:
    parts = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = Metric(parts, ("a", "b"), lambda sums: sums[..., 0] * sums[..., 1])
    assert one.estimate().value == 24
    assert float(ratio(torch.tensor([0.0, 0.0]))) == 0
