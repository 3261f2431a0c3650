"""The authors' own rules of methods that look at the vision tower or at the layers' parts, stated
without st3; see tests/test_authors.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import st3
from st3.methods.scores import TokenView, score_named
from tests.test_authors import SEEDS, N, kept, of, shown

SIDE = 12  # of an image of 144 tokens


def image(seed: int) -> TokenView:
    view = shown(seed)
    view.grids = (((SIDE, SIDE),),)
    return view


def weights(view: TokenView) -> list[Tensor]:
    assert view.towers is not None
    return [tower[0][view.visual[0]] for tower in view.towers]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("count", "alpha"), [(48, 0.1), (96, 0.1), (64, 0.5), (16, 0.2)])
def test_hiprune(seed: int, count: int, alpha: float) -> None:
    """Anchors by the middle layer, their neighbours, and the best of the end to fill up."""
    view = image(seed)
    middle, end = weights(view)
    anchors = middle.topk(int(count * alpha / 5 + 0.5)).indices.tolist()
    chosen = set(anchors)
    for anchor in anchors:
        if anchor % SIDE:
            chosen.add(anchor - 1)
        if anchor % SIDE < SIDE - 1:
            chosen.add(anchor + 1)
        chosen |= {other for other in (anchor - SIDE, anchor + SIDE) if 0 <= other < N}
    for token in end.argsort(descending=True).tolist():
        if len(chosen) < count:
            chosen.add(token)
    policy = st3.HiPrune(keep=count / N, alpha=alpha)
    assert kept(policy.scorer()(view), view, count) == chosen


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("count", "share"), [(48, 0.5), (72, 0.5), (30, 0.25), (20, 0.0)])
def test_vispruner(seed: int, count: int, share: float) -> None:
    """The code's loop: half by attention; of the rest, in its order, at most 8 of every
    second token leave in a round, those most like one of the others."""
    view = image(seed)
    order = weights(view)[0].argsort(descending=True)
    important = int(count * share)
    chosen, residual = order[:important], order[important:]
    unit = torch.nn.functional.normalize(of(view), dim=-1)
    while (drop := min(8, len(residual) - (count - important))) > 0:
        a, b = residual[::2], residual[1::2]
        nearest = (unit[a] @ unit[b].T).max(-1).values
        residual = torch.cat([a[nearest.argsort(descending=True)[drop:]], b])
    wanted = {*chosen.tolist(), *residual.tolist()}
    policy = st3.VisPruner(keep=count / N, important=share)
    assert kept(policy.scorer()(view), view, count) == wanted


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [16, 48, 96])
def test_vscan(seed: int, count: int) -> None:
    """As many from each window of 6 x 6 by the shallow layer; the rest by the deep one."""
    view = image(seed)
    shallow, deep = weights(view)
    each = count // 2 // 4  # of four windows
    chosen: set[int] = set()
    for top in (0, 6):
        for left in (0, 6):
            window = [(top + y) * SIDE + left + x for y in range(6) for x in range(6)]
            chosen |= set(sorted(window, key=lambda i: -float(shallow[i]))[:each])
    for token in deep.argsort(descending=True).tolist():
        if len(chosen) < count:
            chosen.add(token)
    policy = st3.VScan(keep=count / N)
    assert kept(policy.scorer()(view), view, count) == chosen


def test_vscan_drops_again_half_way_through_the_decoder() -> None:
    schedule = st3.VScan().schedule(32)
    assert [schedule.kept(layer, 576) for layer in (0, 15, 16, 31)] == [96, 96, 32, 32]
    assert schedule.mean_share == pytest.approx(64 / 576, abs=1e-3)
    assert st3.VScan().schedule(28).prunes(14)
    made = st3.VScan().at_budget(32, 0.35)
    assert made.schedule(32).mean_share == pytest.approx(0.35)
    assert st3.parse(str(made)) == made
    with pytest.raises(ValueError, match="Use a larger later"):
        st3.VScan().at_budget(32, 0.9)


@pytest.mark.parametrize("seed", SEEDS)
def test_transprune(seed: int) -> None:
    """Growth times the softmax of 1 - cosine, of the attention and the MLP of each layer, and the
    question's attention, each divided by its sum."""
    view = image(seed)
    score = st3.TransPrune().scorer()
    count = view.visual.shape[1]
    generator = torch.Generator().manual_seed(seed)
    turned = torch.zeros(1, count)
    wanted = torch.zeros(N, dtype=torch.double)
    for _ in range(6):
        given, made = torch.randn(2, 1, count, 32, generator=generator).unbind()
        turned = turned + score.turn(given, made, view.visual)  # type: ignore[attr-defined]
        x, y = (part[0][view.visual[0]].double() for part in (given, made))
        change = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1)
        wanted += y.norm(dim=-1) / x.norm(dim=-1) * change.softmax(0)
    looked = torch.rand(1, count, generator=generator)
    view.turned, view.noted = turned, looked
    own = looked[0][view.visual[0]].double()
    wanted = wanted / wanted.sum() + own / own.sum()
    for kept_count in (126, 90, 18):  # 0.875, 0.625, 0.125
        best = set(wanted.argsort(descending=True)[:kept_count].tolist())
        assert kept(score(view), view, kept_count) == best
    schedule = st3.TransPrune().schedule(32)
    assert [schedule.kept(layer, 144) for layer in (6, 7, 9, 12)] == [144, 126, 90, 18]
    assert schedule.mean_share == pytest.approx(0.410, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_covered(share: float) -> None:
    """By the tower alone, by the grid alone, and half of each, as far as they differ."""
    view = image(0)
    tower, _ = weights(view)
    by_tower = set(tower.argsort(descending=True)[:24].tolist())
    by_grid = kept(score_named("grid")(view), view, 24)
    found = kept(st3.Covered(tower=share).scorer()(view), view, 24)
    if share == 0:
        assert found == by_grid
    elif share == 1:
        assert found == by_tower
    else:
        assert set(tower.argsort(descending=True)[:12].tolist()) <= found
        assert kept(score_named("grid")(view), view, 12) <= found


def test_covered_keeps_fewer_with_depth() -> None:
    schedule = st3.Covered(keep=0.5, taper=0.4).schedule(16)
    assert [float(schedule.shares[i]) for i in (0, 4, 8, 12)] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    made = st3.Covered().at_budget(16, 0.35)
    assert made.schedule(16).mean_share == pytest.approx(0.35)
    with pytest.raises(ValueError, match="Use a larger taper"):
        st3.Covered().at_budget(16, 0.95)
    with pytest.raises(ValueError, match="tower"):
        st3.Covered(tower=1.5)
