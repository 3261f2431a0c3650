"""Thirds: its counts, its windows, and what it does where the vision tower says nothing."""

from __future__ import annotations

import math

import pytest
import torch

import st3
from st3.errors import UnsupportedModelError
from st3.methods.policies import parse
from st3.methods.scores import Standout
from st3.models.base import Family
from tests import reference_scores
from tests.helpers import METHODS, Case
from tests.test_cover import image_of
from tests.zoo import FAMILIES, T, V

POLICY = METHODS["thirds"]


def shown(*shape: int, known: bool = True) -> object:
    """An image of random salience."""
    view = image_of(*shape, known=known)
    torch.manual_seed(math.prod(shape))
    view.towers = torch.rand(1, 1, math.prod(shape))
    return view


def test_two_thirds_stay_at_each_third_of_the_depth() -> None:
    shares = [float(share) for share in st3.Thirds(keep=0.9, later=0.5).schedule(32).shares]
    assert shares == pytest.approx([0.9] * 10 + [0.45] * 11 + [0.225] * 11)
    assert st3.Thirds().schedule(16).prunes(5)
    assert st3.Thirds().schedule(16).prunes(10)


@pytest.mark.parametrize("layers", [1, 2, 3, 16, 28, 32, 80])
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.35])
def test_a_budget_is_met_at_any_depth(layers: int, budget: float) -> None:
    policy = st3.Thirds().at_budget(layers, budget)
    assert policy.schedule(layers).mean_share == pytest.approx(budget, abs=1e-6)


@pytest.mark.parametrize("layers", [3, 16, 32])
@pytest.mark.parametrize("budget", [0.69, 0.7, 0.9, 1.0])
def test_a_large_budget_drops_less_within_the_decoder(layers: int, budget: float) -> None:
    policy = st3.Thirds().at_budget(layers, budget)
    assert policy.schedule(layers).mean_share == pytest.approx(budget, abs=1e-6)
    assert policy.keep <= 1
    assert (policy.later > 0.667) == (policy.keep == 1)


def test_no_budget() -> None:
    with pytest.raises(ValueError, match="mean_keep"):
        st3.Thirds().at_budget(16, 1.2)
    assert st3.Thirds(later=1).at_budget(16, 0.9).keep == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("text", "words"),
    [("window=0", "window"), ("every=1", "every"), ("salient=2", "salient"), ("later=-1", "later")],
)
def test_arguments_are_checked(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(f"thirds:{text}")


def test_its_string_says_it_all() -> None:
    text = "thirds:keep=0.4,window=6,curve=linear,tau=64,floor=0.1"
    policy = parse(text)
    assert parse(str(policy)) == policy
    assert policy.schedule(16).anneals
    assert not parse("thirds").schedule(16).anneals


@pytest.mark.parametrize("shape", [(12, 12), (3, 8, 8)])
def test_each_window_has_the_same_share(shape: tuple[int, ...]) -> None:
    """Its own best tokens, by the tower."""
    view = shown(*shape)
    score = Standout(share=1.0, window=4)(view)[0]
    kept = torch.zeros(math.prod(shape), dtype=torch.bool)
    windows = math.prod(shape) // 16
    kept[score.topk(5 * windows).indices] = True
    tower = view.tower[0].view(-1, *shape[-2:])
    kept = kept.view(-1, *shape[-2:])
    for frame, here in zip(tower, kept, strict=True):
        for y in range(0, shape[-2], 4):
            for x in range(0, shape[-1], 4):
                best = frame[y : y + 4, x : x + 4].flatten().topk(5).indices
                assert here[y : y + 4, x : x + 4].flatten().nonzero().flatten().tolist() == sorted(
                    best.tolist()
                )


def test_windows_that_are_no_whole_ones_and_images_without_a_grid() -> None:
    """10 x 7 tokens are windows of 16, 12, 8 and 6; 40 in a row are runs of 16, 16 and 8."""
    half = {True: [8, 6, 8, 6, 4, 3], False: [8, 8, 8, 8, 3]}
    for known, wanted in half.items():
        view = shown(10, 7, known=known)
        score = Standout(share=1.0, window=4)(view)[0]
        kept = torch.zeros(70, dtype=torch.bool)
        kept[score.topk(35).indices] = True
        if known:
            grid = kept.view(10, 7)
            found = [
                int(grid[y : y + 4, x : x + 4].sum())
                for y in range(0, 10, 4)
                for x in range(0, 7, 4)
            ]
        else:
            found = [int(part.sum()) for part in kept.split(16)]
        assert found == wanted


def test_a_share_of_the_tokens_are_the_grids() -> None:
    view = shown(12, 12)
    grid = set(Standout(share=0.0)(view)[0].topk(16).indices.tolist())
    best = set(Standout(share=1.0)(view)[0].topk(32).indices.tolist())
    kept = set(Standout(share=0.667)(view)[0].topk(48).indices.tolist())
    assert grid <= kept
    assert len(kept & best) >= 31


# Without the tower ------------------------------------------------------------------------------


@pytest.fixture
def no_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    def tower(*_: object) -> None:
        raise UnsupportedModelError("not known")

    monkeypatch.setattr(Family, "tower", tower)
    monkeypatch.setattr(reference_scores, "tower_weights", lambda *_: None)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.usefixtures("no_tower")
def test_where_the_tower_cannot_be_followed_what_is_rare_stands_out(name: str) -> None:
    case = Case.of(name)
    case.check_prefill(POLICY)
    case.check_generate(POLICY, 4)
    report = case.prefill(POLICY)[1]
    assert "ranked by the embeddings" in " ".join(str(report).split())


def test_where_it_can_be_the_report_says_nothing_of_it() -> None:
    report = Case.of("llava").prefill(POLICY)[1]
    assert not report.lacks_tower
    assert "ranked by" not in str(report)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family(name: str) -> None:
    """The default runs on all that can be trimmed, with the tower's attention or without."""
    case = Case.of(name)
    try:
        case.prefill(METHODS["grid"])
    except UnsupportedModelError:
        pytest.skip("cannot be trimmed")
    logits, report = case.prefill(POLICY)
    assert torch.isfinite(logits[case.valid]).all()
    policy = st3.trim(case.model, POLICY).schedule
    for row, count in enumerate(case.visual.sum(1).tolist()):
        assert report.kept[row] == tuple(policy.kept(i, count) for i in range(case.layers))
    assert case.generate(POLICY, 3).sequences.shape[1] == case.width + 3


@pytest.mark.usefixtures("no_tower")
def test_methods_that_have_no_other_way_are_still_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not known"):
        Case.of("llava").prefill(METHODS["visionzip"])


def test_features_that_no_tower_made() -> None:
    """Ready-made embeddings: nothing is heard, and nothing known of their grid."""
    case = Case.of("llava")
    inner = case.model.model
    with torch.no_grad():
        embeds = inner.get_input_embeddings()(case.batch["input_ids"])
        made = inner.get_image_features(pixel_values=case.batch["pixel_values"])
        features = torch.cat(list(getattr(made, "pooler_output", made)))
        embeds[case.visual] = features.to(embeds.dtype)
        with st3.trim(case.model, POLICY, visual_mask=case.visual) as trimmer:
            case.model(inputs_embeds=embeds, attention_mask=case.batch["attention_mask"])
    assert trimmer.report.lacks_tower
    schedule = case.schedule(POLICY)
    for row, count in enumerate(case.visual.sum(1).tolist()):
        assert trimmer.report.kept[row] == tuple(
            schedule.kept(layer, count) for layer in range(case.layers)
        )


@pytest.mark.usefixtures("no_tower")
def test_a_video() -> None:
    """Its windows lie in a frame."""
    Case.of("qwen2_5_vl", [[T(3), V(), T(4)]]).check_prefill(POLICY)
