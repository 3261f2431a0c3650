"""The tiny models and the slow reference judge the engine; here they are judged themselves."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests import reference
from tests.reference import FakeSchedule, Score, reference_generate, reference_prefill
from tests.zoo import FAMILIES, HYBRIDS, INDEXED, REFUSED, UNTRIED, Family, I, T, V

ALL = pytest.mark.parametrize("name", list(FAMILIES))
NOTHING = FakeSchedule()
PYRAMID = FakeSchedule(((2, 0.5), (4, 0.3), (6, 0.1)))


@functools.cache
def build(name: str) -> tuple[Family, PreTrainedModel]:
    """Nothing here changes a model, so one of each will do."""
    return FAMILIES[name], FAMILIES[name].model()


def rows_for(family: Family) -> list[list[T | I | V]]:
    """A ragged batch: one image, two images, no image, as far as the family allows."""
    rows = [[T(5), I(), T(4)], [T(3), I(), T(2), I(), T(6)], [T(7)]]
    if not family.multi_image:
        rows[1] = [T(3), I(), T(6)]
    if not family.text_rows:
        rows[2] = [T(2), I(), T(3)]
    return rows


@ALL
def test_weights_are_the_same_every_time(name: str) -> None:
    first, second = FAMILIES[name].model().state_dict(), FAMILIES[name].model().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@ALL
@torch.no_grad()
def test_padded_rows_equal_solo_rows(name: str) -> None:
    family, model = build(name)
    if not family.solo:
        pytest.skip("rows of a batch depend on each other in this family")
    rows = rows_for(family)
    together = model(**family.inputs(model, rows)).logits
    for i in range(len(rows)):
        solo = model(**family.inputs(model, rows, only=i)).logits[0]
        torch.testing.assert_close(together[i, -len(solo) :], solo, atol=1e-4, rtol=0)


@ALL
@torch.no_grad()
def test_right_padded_rows_equal_left_padded_rows(name: str) -> None:
    family, model = build(name)
    rows = rows_for(family)
    left = family.inputs(model, rows)
    right = family.inputs(model, rows, padding="right")
    a, b = model(**left).logits, model(**right).logits
    for i in range(len(rows)):
        at_left, at_right = left["attention_mask"][i].bool(), right["attention_mask"][i].bool()
        torch.testing.assert_close(a[i, at_left], b[i, at_right], atol=1e-4, rtol=0)


@ALL
@torch.no_grad()
def test_logits_depend_on_the_image(name: str) -> None:
    family, model = build(name)
    batch = family.inputs(model, rows_for(family), only=0)
    other = {k: v.flip(-1) if "pixel" in k or "patch" in k else v for k, v in batch.items()}
    assert (model(**batch).logits[0, -1] - model(**other).logits[0, -1]).abs().mean() > 0.05


@ALL
def test_visual_mask_and_spans_agree(name: str) -> None:
    family, model = build(name)
    rows = rows_for(family)
    batch = family.inputs(model, rows)
    mask, spans = family.visual_mask(model, batch), family.visual_spans(model, batch)
    for i, row in enumerate(rows):
        images = [s for s in row if isinstance(s, I)]
        assert len(spans[i]) == len(images)
        inside = torch.zeros_like(mask[i])
        for start, end in spans[i]:
            assert mask[i, [start, end - 1]].all()
            assert 8 <= mask[i, start:end].sum() <= 145
            inside[start:end] = True
        assert not (mask[i] & ~inside).any()


@ALL
def test_video(name: str) -> None:
    family, model = build(name)
    if not family.supports_video:
        pytest.skip("no video")
    rows = [[T(3), V(), T(4)], [T(2), V(), T(2)], [T(5)]]
    batch = family.inputs(model, rows)
    assert family.visual_mask(model, batch).any(-1).tolist() == [True, True, False]
    with torch.no_grad():
        logits = model(**batch).logits
        for i in range(len(rows)):
            solo = model(**family.inputs(model, rows, only=i)).logits[0]
            torch.testing.assert_close(logits[i, -len(solo) :], solo, atol=1e-4, rtol=0)


@ALL
def test_no_ties_in_the_ranking(name: str) -> None:
    """Neighbours in the ranking differ by far more than fp32 noise, so that a wrong choice in the
    code under test is a bug and not an accident."""
    family, model = build(name)
    batch = family.inputs(model, rows_for(family))
    visual = family.visual_mask(model, batch)
    result = reference_prefill(model, batch, PYRAMID, visual)
    for kept, scores in zip(result.kept, result.scores, strict=True):
        for row in range(len(visual)):
            here = scores[row, visual[row] & kept[row]].sort().values
            gaps = here.diff() / here[1:]
            if len(gaps):
                assert gaps.min() > 3e-6, gaps.min()


# -- the reference ------------------------------------------------------------------------------


@ALL
def test_reference_that_drops_nothing_is_the_bare_model(name: str) -> None:
    family, model = build(name)
    batch = family.inputs(model, rows_for(family))
    visual = family.visual_mask(model, batch)
    with torch.no_grad():
        bare = model(**batch).logits
    valid = batch["attention_mask"].bool()
    result = reference_prefill(model, batch, NOTHING, visual)
    torch.testing.assert_close(result.logits[valid], bare[valid], atol=1e-5, rtol=1e-5)
    out = model.generate(
        **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens, logits = reference_generate(model, batch, NOTHING, visual, 6)
    assert torch.equal(tokens, out.sequences[:, -6:])
    torch.testing.assert_close(logits, torch.stack(out.logits, 1), atol=1e-5, rtol=1e-5)


@ALL
def test_reference_drops_what_the_schedule_says(name: str) -> None:
    family, model = build(name)
    batch = family.inputs(model, rows_for(family))
    visual, valid = family.visual_mask(model, batch), batch["attention_mask"].bool()
    result = reference_prefill(model, batch, PYRAMID, visual)
    full = reference_prefill(model, batch, NOTHING, visual)
    assert (result.logits[0, -1] - full.logits[0, -1]).abs().max() > 1e-3  # it matters
    before = valid
    for layer, kept in enumerate(result.kept):
        for row in range(len(visual)):
            n = int(visual[row].sum())
            assert (kept & visual)[row].sum() == PYRAMID.kept(layer, n)
        assert not (kept & ~before).any()
        assert torch.equal(kept & ~visual, valid & ~visual)
        before = kept


@ALL
def test_dropped_tokens_are_seen_by_nobody(name: str) -> None:
    """The last logits have no gradient to the hidden state of a dropped token from its layer on,
    and some to that of every kept token."""
    family, model = build(name)
    batch = family.inputs(model, rows_for(family), only=0)
    visual = family.visual_mask(model, batch)
    kept = reference_prefill(model, batch, PYRAMID, visual).kept
    layers = next(
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.ModuleList) and len(module) == len(kept)
    )
    inputs: list[Tensor] = []

    def watch(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.requires_grad_(True)
        hidden.retain_grad()
        inputs.append(hidden)

    now = reference._new_pass(batch, PYRAMID, visual, None, None)
    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
    with reference._running(model, now):
        model(**batch, use_cache=False).logits[0, -1, 60:].sum().backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    text = model.config.get_text_config(decoder=True)
    windows = any(t != "full_attention" for t in getattr(text, "layer_types", None) or [])
    windows = windows or getattr(text, "sliding_window", None) is not None
    for layer, hidden in enumerate(inputs):
        assert hidden.grad is not None
        size = hidden.grad[0].abs().amax(-1)
        assert (size[visual[0] & ~kept[layer][0]] == 0).all()
        if not windows:  # which may hide kept tokens
            assert (size[kept[layer][0]] > 0).all()


def test_decode_visibility_equals_a_full_forward_with_a_4d_mask() -> None:
    """Nothing dropped at prefill, all visual tokens hidden while decoding: the same as one plain
    forward over prompt and answer whose mask says so."""
    family, model = build("llava")
    batch = family.inputs(model, [[T(5), I(), T(4)]])
    visual = family.visual_mask(model, batch)
    tokens, logits = reference_generate(model, batch, FakeSchedule(tau=1), visual, 5)
    prompt = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], tokens], 1)
    allowed = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    allowed[prompt:, :prompt] &= ~visual[0]
    mask = torch.zeros(1, 1, *allowed.shape).masked_fill(~allowed, -torch.inf)
    with torch.no_grad():
        full = model(
            input_ids=ids,
            pixel_values=batch["pixel_values"],
            attention_mask=mask,
            position_ids=torch.arange(ids.shape[1])[None],
        ).logits
    torch.testing.assert_close(logits, full[:, prompt - 1 : -1], atol=1e-5, rtol=1e-5)


def test_annealing_shows_the_best_of_the_layer() -> None:
    """At floor 0.5 each layer keeps showing the better half of its own tokens."""
    family, model = build("llava")
    batch = family.inputs(model, rows_for(family))
    visual = family.visual_mask(model, batch)
    schedule = FakeSchedule(((2, 0.5),), tau=1, floor=0.5)
    now = reference._new_pass(batch, schedule, visual, None, None)
    with reference._running(model, now), torch.no_grad():
        model(**batch, use_cache=False)
    for layer in range(8):
        shown = now.decode(layer, 1) & visual
        for row in range(3):
            kept = now.kept[layer][row] & visual[row]
            wanted = schedule.visible(layer, int(visual[row].sum()), 1)
            assert shown[row].sum() == wanted
            if wanted:
                worst = now.scores[layer][row, shown[row]].min()
                assert (now.scores[layer][row, kept & ~shown[row]] <= worst).all()


def test_per_image_budgets() -> None:
    family, model = build("qwen2_5_vl")
    batch = family.inputs(model, [[T(3), I(2, 4), T(2), I(4, 4), T(3)]])
    visual, spans = family.visual_mask(model, batch), family.visual_spans(model, batch)
    result = reference_prefill(model, batch, PYRAMID, visual, per_image_spans=spans)
    counts = [
        [int((kept & visual)[0, start:end].sum()) for start, end in spans[0]]
        for kept in result.kept
    ]
    assert counts == [[PYRAMID.kept(layer, n) for n in (8, 16)] for layer in range(8)]


def test_own_score() -> None:
    """A score of one's own decides; ties go to the lower position."""
    family, model = build("llava")
    batch = family.inputs(model, rows_for(family), only=0)
    visual = family.visual_mask(model, batch)
    result = reference_prefill(
        model,
        batch,
        FakeSchedule(((2, 0.5),)),
        visual,
        score=Score(lambda seen: torch.zeros_like(seen.attention)),
    )
    places = visual[0].nonzero().flatten()
    assert result.kept[2][0, places].tolist() == [True] * 8 + [False] * 8


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_reference_generates_with_beams_and_several_sequences(options: dict[str, int]) -> None:
    family, model = build("qwen2_vl")
    batch = family.inputs(model, rows_for(family))
    visual = family.visual_mask(model, batch)
    more = {"do_sample": "num_beams" not in options, **options}
    torch.manual_seed(0)
    bare = model.generate(**batch, max_new_tokens=5, **more)
    torch.manual_seed(0)
    tokens, _ = reference_generate(model, batch, NOTHING, visual, 5, **more)
    assert torch.equal(tokens, bare[:, -5:])


# -- the families that are refused --------------------------------------------------------------


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_models_can_be_built(name: str) -> None:
    factory, reason = REFUSED[name]
    assert sum(parameter.numel() for parameter in factory().parameters()) < 1_000_000
    assert reason


@pytest.mark.upstream
def test_every_family_of_transformers_has_its_place() -> None:
    """A new release with a new family fails here: build it, refuse it, or say why not."""
    have = {
        family.model_type or name for name, family in {**FAMILIES, **HYBRIDS, **INDEXED}.items()
    }
    have |= set(REFUSED) | set(UNTRIED) | {"vision-encoder-decoder", "kosmos-2", "kosmos-2.5"}
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= have
