"""PixelPrune: how many tokens stay is the image's own number; against the slow reference, against a
model from which the tokens were taken out, and wherever a row's count matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import st3
from st3.methods.scores import Novelty
from st3.models import visual
from st3.tools.serve import Engine
from tests.helpers import Case, answer, assert_same, images, rows_for
from tests.reference_pixels import surprises
from tests.serving import load, picture, turn
from tests.test_serve_batch import company
from tests.zoo import I, T, V, build

# A tower of squares; a pixel shuffle; merged patches; averaged patches and windows; packed tiles
# with newline tokens; pictures in a corner of a padded one; no text row may go along.
FAMILIES = ["llava", "internvl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next", "smolvlm"]
SOME = st3.PixelPrune(threshold=3.7)  # of random pixels, which repeat nothing
EXACT = st3.PixelPrune()
SEVERAL = [[T(2), I(), T(3), I(), I(), T(4)], [I(), T(6)], [T(3), I(), T(2)]]


def repeat(case: Case, seed: int = 0) -> None:
    """Give a case images in which cells of 4 x 4 pixels are one of two flat colours."""
    pixels = case.batch["pixel_values"]
    colour = torch.randint(0, 2, (*pixels.shape[:-2], pixels.shape[-2] // 4, pixels.shape[-1] // 4),
                           generator=torch.Generator().manual_seed(seed))  # fmt: skip
    colour = colour[:, :1].expand_as(colour).float() - 0.25
    case.batch["pixel_values"] = colour.repeat_interleave(4, -1).repeat_interleave(4, -2)


def counts(report: st3.Report) -> list[int]:
    return [row[0] for row in report.kept]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    case = Case.of(name)
    case.check_prefill(SOME)
    case.check_generate(SOME, 8)
    report = case.prefill(SOME)[1]
    assert 0 < sum(counts(report)) < sum(report.n_visual)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_exact_repetitions(threshold: float) -> None:
    case = Case.of("llava", SEVERAL)
    repeat(case)
    policy = st3.PixelPrune(threshold)
    case.check_prefill(policy)
    case.check_generate(policy, 8)
    report = case.prefill(policy)[1]
    kept, there = counts(report), report.n_visual
    assert len(set(kept)) > 1
    assert all(0 < few < all_ for few, all_ in zip(kept, there, strict=True))
    assert report.mean_share == sum(kept) / sum(there)
    assert report.to_dict()["kept"] == report.kept
    assert report.first_drop == 0
    for row, count in enumerate(kept):
        assert report.kept_positions(5, row).numel() == count


def test_what_leaves_is_really_gone() -> None:
    """The bare decoder on the embeddings that are left, at their own positions."""
    case = Case.of("llava", [[T(3), I(), T(6)]])
    repeat(case)
    logits, report = case.prefill(EXACT)
    kept = torch.ones(case.width, dtype=torch.bool)
    kept[case.visual[0]] = False
    kept[case.visual[0].nonzero().flatten()[report.kept_positions(0)]] = True
    assert int((~kept).sum()) == report.n_visual[0] - counts(report)[0] > 0
    inner: Any = case.model.model
    embeds = inner.get_input_embeddings()(case.batch["input_ids"])
    features = inner.get_image_features(case.batch["pixel_values"], return_dict=True).pooler_output
    embeds[case.visual] = torch.cat(list(features)).view(-1, embeds.shape[-1])
    with torch.no_grad():
        hidden = inner.language_model(
            inputs_embeds=embeds[:, kept], position_ids=kept.nonzero().T
        ).last_hidden_state
        assert_same(logits[:, kept], case.model.lm_head(hidden))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_row_of_a_batch_is_the_row_alone(name: str) -> None:
    case = Case.of(name)
    whole = answer(case.generate(SOME, 6), case.width)
    for row in range(len(case.visual)):
        case.batch = case.family.inputs(case.model, rows_for(case.family), only=row)
        alone = case.generate(SOME, 6)
        assert torch.equal(answer(alone, case.width)[0], whole[row])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_images_that_repeat_nothing_are_bitwise_untrimmed(name: str) -> None:
    case = Case.of(name)
    with torch.no_grad():
        bare = case.model(**case.batch).logits
    logits, report = case.prefill(EXACT)
    assert torch.equal(logits, bare)
    assert report.mean_share == 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "seed": 0,
                                     "num_return_sequences": 2}], ids=str)  # fmt: skip
def test_repeated_rows(options: dict[str, Any]) -> None:
    Case.of("llava").check_generate(SOME, 8, **options)


def test_a_budget_for_each_image() -> None:
    """Of each image the tokens that it keeps are its own; alone, and cut by a score that goes by
    another schedule."""
    case = Case.of("llava", SEVERAL)
    spans = images(case)
    case.check_prefill(SOME, spans=spans, per_image=True)
    case.check_generate(SOME, 4, spans=spans)


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_a_share_is_kept_exactly(keep: float) -> None:
    case = Case.of("llava")
    repeat(case)
    for policy in (st3.PixelPrune(keep=keep), EXACT.at_budget(8, keep)):
        case.check_prefill(policy)
        report = case.prefill(policy)[1]
        assert counts(report) == [round(keep * count) for count in report.n_visual]


def test_what_differs_comes_first_and_the_rest_by_a_grid() -> None:
    case = Case.of("llava", [[T(3), I(), T(6)]])
    repeat(case)
    own = case.prefill(EXACT)[1].kept_positions(0).tolist()
    for keep in (len(own) / 16, (len(own) + 2) / 16):
        more = case.prefill(st3.PixelPrune(keep=keep))[1].kept_positions(0).tolist()
        assert set(own) <= set(more)
    fewer = case.prefill(st3.PixelPrune(keep=(len(own) - 1) / 16))[1].kept_positions(0).tolist()
    assert set(fewer) < set(own)


def test_as_a_score_of_another_schedule() -> None:
    case = Case.of("llava")
    repeat(case)
    case.check_prefill(st3.parse("st3:first_layer=2,stride=2,score=pixelprune"))
    case.check_generate(st3.parse("st3:first_layer=2,stride=2,score=pixelprune,tau=6"), 8)


def test_turns_and_a_second_image() -> None:
    """The second turn's image keeps its own number; the first one's stay what they are."""
    case = Case.of("llava", [[T(3), I(), T(6)]])
    more = case.family.inputs(case.model, [[T(2), I(), T(5)]], seed=5)
    with torch.no_grad(), st3.trim(case.model, SOME) as trimmer:
        first = case.model(**case.batch)
        once = counts(trimmer.report)
        ids = torch.cat([case.batch["input_ids"], more["input_ids"]], 1)
        out = case.model(
            input_ids=more["input_ids"],
            pixel_values=more["pixel_values"],
            attention_mask=torch.ones_like(ids),
            past_key_values=first.past_key_values,
        )
        again = counts(trimmer.report)
    both = Case.of("llava", [[T(3), I(), T(6), T(2), I(), T(5)]])
    both.batch["input_ids"] = ids
    both.batch["pixel_values"] = torch.cat([case.batch["pixel_values"], more["pixel_values"]])
    logits, report = both.prefill(SOME)
    assert counts(report) == [once[0] + again[0]]
    assert_same(out.logits[:, -5:], logits[:, -5:])


def test_rows_that_join_a_running_batch() -> None:
    """Each brings its own number, which is in the server's account."""
    both = company("llava")
    family, model = both.family, both.model
    prompts = [[T(5), I(), T(4)], [T(2), I(), I(), T(6)]]
    inputs = [family.inputs(model, prompts, only=i) for i in range(2)]
    prompt = both.prefilled(0, inputs[0], SOME)
    assert prompt.visual == 16
    assert sum(prompt.sequence.counts.budgets) < 16
    assert prompt.sequence.counts.at(3)[-1] == sum(prompt.sequence.counts.budgets)
    both.change([], {0: prompt})
    both.step(2)
    both.change([], {1: both.prefilled(1, inputs[1], SOME)})
    both.step(3)
    for i in range(2):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], SOME, len(got)))


def test_a_server_tells_of_them(tiny_model: Path) -> None:
    """Of a flat image one token, and of the figures in an answer the untrimmed number."""
    engine = Engine(*load(tiny_model), policy="pixelprune", kv_budget_bytes=1 << 20)
    flat = Image.new("RGB", (30, 30), (20, 120, 200))
    try:
        told = [
            engine.complete(engine.prepare(turn("what is the image", *pictures), max_tokens=3))
            for pictures in ([flat], [flat, picture()], [])
        ]
    finally:
        engine.close()
    assert [one.visual_tokens for one in told] == [16, 32, 0]
    assert [one.mean_share for one in told] == [1 / 16, 17 / 32, 1.0]


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4_per_layer"])
def test_decoders_whose_layers_are_not_all_alike(name: str) -> None:
    """A row of a batch is the row alone, and equals the embeddings' own share at the same count."""
    family, model = build(name)
    rows = rows_for(family)
    with (
        torch.no_grad(),
        st3.trim(model, st3.PixelPrune(threshold=3.7 if name == "qwen3_5" else 0.9)) as trimmer,
    ):
        batch = family.inputs(model, rows)
        logits = model(**batch).logits[:, -1]
        kept = counts(trimmer.report)
        assert 0 < sum(kept) < sum(trimmer.report.n_visual)
        for row in range(len(rows)):
            alone = model(**family.inputs(model, rows, only=row)).logits[:, -1]
            assert_same(logits[row : row + 1], alone)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of("qwen2_5_vl", [[T(3), V(), T(4)]])
    with pytest.raises(st3.UnsupportedModelError, match=r"videos.*use a policy that does not look"):
        case.prefill(SOME)
    other = Case.of("llava")
    with pytest.raises(ValueError, match="takes its counts from the images"):
        st3.trim(other.model, st3.Random(like=SOME))
    with pytest.raises(ValueError, match="threshold must be a number from 0, got -1"):
        st3.PixelPrune(threshold=-1)
    with pytest.raises(ValueError, match="keep must lie between 0 and 1"):
        st3.parse("pixelprune:keep=2")
    monkeypatch.setattr(visual, "_tokens", lambda features: 5)
    with pytest.raises(st3.UnsupportedModelError, match="which pixels a visual token is made of"):
        other.prefill(SOME)
    unknown = Case.of("video_llava")
    with pytest.raises(st3.UnsupportedModelError, match="which pixels a visual token"):
        st3.trim(unknown.model, SOME).attach()


def test_nothing_is_left_on_the_model() -> None:
    case = Case.of("llava")
    own = dict(vars(case.model.model))
    with st3.trim(case.model, SOME):
        assert vars(case.model.model) != own
    assert vars(case.model.model) == own


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 8), (12, 12)], ids=str)
def test_the_authors_rule(shape: tuple[int, int], threshold: float) -> None:
    """What is kept is what the code's ``pred_2d`` keeps, which goes from token to token."""
    draw = torch.Generator().manual_seed(sum(shape))
    blocks = torch.randint(0, 3, shape, generator=draw).repeat_interleave(2, 1)[:, : shape[1]]
    cells = blocks[..., None].float() + 0.3 * torch.rand(*shape, 3, generator=draw).round()
    known = {(y, x): cells[y, x] for y in range(shape[0]) for x in range(shape[1])}
    found = Novelty(threshold).of_pixels(cells)
    wanted = torch.tensor(list(surprises(known, threshold).values())).view(shape)
    torch.testing.assert_close(found, wanted)
    assert bool((found > threshold)[0, 0])
    if min(shape) > 4:
        assert 0.2 < float((found > threshold).float().mean()) < 0.99
