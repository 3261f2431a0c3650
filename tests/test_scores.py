"""Methods of other papers and scores on ST3's schedule, against the slow reference; what each score
says; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import st3
from st3.engine.prefill import Prefill
from st3.hf.cache import stores_of
from st3.hf.call import cache_of
from st3.methods.policies import parse
from st3.methods.scores import SCORES, Attention, score_named, stage_of
from st3.models import tower_attention
from tests.helpers import ANNEAL, METHODS, SCORED, Case, images
from tests.test_cover import image_of
from tests.test_forward import gradients
from tests.zoo import FAMILIES, I, T, V

# A CLIP tower; InternViT and a pixel shuffle; DeepStack, 3D positions and normed queries; sliding
# windows and images that attend both ways.
FEW = ["llava", "internvl", "qwen3_vl", "gemma3"]
CLASS_TOKEN = ["llava", "internvl", "llava_next", "vipllava"]
# Windows and merged patches; DeepStack; averaged patches; a pixel shuffle.
TOWERS = [*CLASS_TOKEN, "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm"]
MORE_TOWERS = ["qwen2_vl", "pixtral", "paligemma", "llava_onevision", "idefics3"]
SEVERAL = [[T(2), I(), T(3), I(), I(), T(4)], [I(), T(6)], [T(3), I(), T(2)]]
NEW = {**METHODS, **SCORED}


def looks_at_the_tower(policy: st3.Policy) -> bool:
    return "tower" in getattr(policy.scorer(), "needs", ())


MATRIX = [
    (family, method)
    for method, policy in METHODS.items()
    for family in (TOWERS if looks_at_the_tower(policy) else FEW)
]


@pytest.mark.parametrize(("name", "method"), MATRIX)
def test_methods(name: str, method: str) -> None:
    case = Case.of(name)
    case.check_prefill(METHODS[method])
    case.check_generate(METHODS[method], 8)


@pytest.mark.parametrize("name", [name for name in MORE_TOWERS if name in FAMILIES])
def test_what_a_vision_tower_attends_to(name: str) -> None:
    """In two of its layers, whatever the way from its patches to the visual tokens."""
    Case.of(name).check_prefill(METHODS["hiprune"])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_tower_in_small_blocks_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_attention, "_NUMBERS", 40)
    Case.of(name).check_prefill(METHODS["hiprune"])


def test_flash_attention_gets_the_parts_of_a_row_at_once() -> None:
    """As if each had been a call of its own."""
    query, key = torch.randn(2, 1, 2, 9, 4).unbind()
    given = {"cu_seq_lens_q": torch.tensor([0, 4, 9])}
    whole = tower_attention._received(query, key, 0.5, None, tower_attention._ends(given, 9))
    parts = [
        tower_attention._received(query[:, :, a:b], key[:, :, a:b], 0.5, None, [b - a])
        for a, b in ((0, 4), (4, 9))
    ]
    torch.testing.assert_close(whole, torch.cat(parts, 1))
    torch.testing.assert_close(whole[:, :4].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("method", ["evs", "vidcom2", "grid"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_videos(name: str, method: str) -> None:
    """Of several frames, of which the engine knows the grid."""
    case = Case.of(name, [[T(3), V(), T(4)], [T(2), V(), T(2)], [T(5)]])
    case.check_prefill(METHODS[method])
    case.check_generate(METHODS[method], 4)


@pytest.mark.parametrize("score", SCORED)
def test_scores_on_another_schedule(score: str) -> None:
    case = Case.of("llava")
    case.check_prefill(SCORED[score])
    case.check_generate(SCORED[score], 8)


@pytest.mark.parametrize(
    "method",
    [
        "dart",
        "divprune",
        "sparsevlm",
        "feather",
        "grid",
        "scope",
        "mmr",
        "vidcom2",
        "prunesid",
        "hiprune",
        "vispruner",
        "vscan",
        "thirds",
        "transprune",
    ],
)
def test_several_images_in_a_prompt(method: str) -> None:
    Case.of("llava", SEVERAL).check_prefill(METHODS[method])


@pytest.mark.parametrize(
    "method",
    [
        "divprune",
        "v2drop",
        "visionzip",
        "dart",
        "prunesid",
        "scope",
        "mmr",
        "hiprune",
        "vispruner",
        "vscan",
        "thirds",
        "transprune",
    ],
)
def test_a_budget_for_each_image(method: str) -> None:
    case = Case.of("llava", SEVERAL)
    spans = images(case)
    case.check_prefill(METHODS[method], spans=spans, per_image=True)
    case.check_generate(METHODS[method], 4, spans=spans)


@pytest.mark.parametrize(
    "method", ["divprune", "dart", "feather", "visionzip", "vscan", "transprune", "prunesid"]
)
def test_beam_search(method: str) -> None:
    Case.of("llava").check_generate(METHODS[method], 8, num_beams=3)


@pytest.mark.parametrize("method", ["dycoke", "grid"])
def test_several_answers_to_a_prompt(method: str) -> None:
    options = {"do_sample": True, "num_return_sequences": 2, "seed": 0}
    Case.of("llava").check_generate(METHODS[method], 8, **options)


@pytest.mark.parametrize("method", [name for name in NEW if name != "pixelprune"])
def test_random_choice_at_the_counts_of_each(method: str) -> None:
    case = Case.of("llava")
    policy = st3.Random(like=NEW[method], seed=1)
    report = case.prefill(policy)[1]
    assert [report.kept_positions(i, 0).numel() for i in range(case.layers)] == [
        case.schedule(NEW[method]).kept(i, 16) for i in range(case.layers)
    ]
    assert parse(str(policy)) == policy


@pytest.mark.parametrize("method", ["divprune", "v2drop", "dart", "vscan", "thirds", "transprune"])
def test_gradient_checkpointing(method: str) -> None:
    case = Case.of("llava")
    plain = gradients(case, METHODS[method], None)
    again = gradients(case, METHODS[method], False)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, msg=key)


def test_methods_take_nothing_that_they_do_not_need() -> None:
    """The paper's ST3 keeps no keys, tables or earlier scores."""
    case = Case.of("llava")
    with st3.trim(case.model, st3.ST3(score="attention")) as trimmer:
        case.model(**case.batch)
        attachment = trimmer._attachment
        assert attachment is not None
        current = attachment.session.current
        assert isinstance(current, Prefill)
        taken = current.ranker
        assert (taken._keys, taken._carried, taken._prepared, taken.tower) == (None,) * 4
        assert (taken._noted, taken._turned, list(current.plan.turns)) == (None, None, [])
        assert attachment._tower is None


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral3", "glm4v"])
def test_towers_whose_way_to_the_tokens_is_not_known(name: str) -> None:
    with (
        pytest.raises(st3.UnsupportedModelError, match=r"cannot be followed .* score=divprune"),
        st3.trim(Case.of(name).model, "visionzip"),
    ):
        pass


def test_a_class_token_that_is_a_visual_token() -> None:
    model = Case.of("llava").model
    model.config.vision_feature_select_strategy = "full"
    with (
        pytest.raises(st3.UnsupportedModelError, match="takes the class token itself"),
        st3.trim(model, "visionzip"),
    ):
        pass
    assert "_st3_trimmer" not in model.__dict__


def test_image_features_that_no_tower_made() -> None:
    case = Case.of("llava")
    embeds = case.model.get_input_embeddings()(case.batch["input_ids"])
    with (
        st3.trim(case.model, "visionzip", visual_mask=case.visual),
        pytest.raises(st3.UnsupportedModelError, match="gave 0 weights"),
    ):
        case.model(inputs_embeds=embeds, attention_mask=case.batch["attention_mask"])


# Not all of them are in every supported version of transformers.
ROTATED_OTHERWISE = ["kimi_k25", "cohere2_vision", "fuyu", "hunyuan_vl", "muse_spark"]


@pytest.mark.parametrize("name", [name for name in ROTATED_OTHERWISE if name in FAMILIES])
def test_rotations_that_cannot_be_undone(name: str) -> None:
    with (
        pytest.raises(st3.UnsupportedModelError, match="rank by another score"),
        st3.trim(Case.of(name).model, "feather"),
    ):
        pass


@pytest.mark.parametrize("score", ["attention", "dart", "hidden-change", "key_norm"])
def test_no_drop_before_layer_0_without_a_score_of_embeddings(score: str) -> None:
    class Early(st3.DivPrune):
        def scorer(self) -> Any:
            return score_named(score)

    with pytest.raises(ValueError, match="of the embeddings, such as divprune"):
        st3.trim(Case.of("llava").model, Early())


def test_everything_is_taken_back() -> None:
    model = Case.of("llava_next").model
    before = set(model.model.__dict__)
    with st3.trim(model, "visionzip"):
        pass
    assert set(model.model.__dict__) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- recall -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_st3_with_recall(name: str) -> None:
    policy = st3.ST3(stride=2, recall_every=2, anneal=ANNEAL)
    Case.of(name).check_generate(policy, 16)


def test_recall_outlives_growing_buffers_and_compaction() -> None:
    """Hidden entries are still there when buffers have been copied."""
    case = Case.of("llava")
    case.check_generate(st3.DyCoke(layer=1, keep=0.2, every=5), 48)
    with st3.trim(case.model, st3.DyCoke(layer=1, keep=0.2)) as trimmer, torch.no_grad():
        cache = cache_of(
            case.model.generate(**case.batch, max_new_tokens=4, return_dict_in_generate=True)
        )
        trimmer.compact()
    for store in stores_of(cache).values():
        assert store.filled.base <= min(row.pad for row in store.rows)


def test_recall_brings_back_what_was_hidden() -> None:
    case = Case.of("llava")
    anneal = st3.Anneal("linear", tau=1, floor=0.3)
    frozen = st3.ST3(first_drop=0, final_keep=1, anneal=anneal, score="attention")
    recalled = st3.DyCoke(layer=0, keep=0.3, every=2)
    assert case.schedule(frozen).visible(4, 16, 3) == case.schedule(recalled).visible(4, 16, 3)
    one, other = (torch.stack(case.generate(p, 8).logits) for p in (frozen, recalled))
    assert torch.equal(one[:3], other[:3])  # the first new choice follows step 2
    assert not torch.allclose(one[3:], other[3:])


def test_recall_and_rerank_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        st3.ST3(rerank_every=2, recall_every=2)


# -- names and formulas -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("attention", Attention()),
        ("attention-max", Attention(heads="max")),
        ("text-rows", Attention(rows="text")),
        ("attention-text-rows", Attention(rows="text")),
        ("text-rows-visual-heads", Attention(rows="text", heads="visual")),
        ("attention-no-rope-max", Attention(rotary=False, heads="max")),
        ("attention-debiased-lazy16", Attention(debias="divide", lazy=16)),
        ("attention-detrended", Attention(debias="subtract")),
    ],
)
def test_names_of_attention_scores(name: str, score: Attention) -> None:
    assert score_named(name) == score
    assert score_named(score.name) == score
    policy = parse(f"st3:score={name}")
    assert policy.scorer() == score
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(
    "name",
    ["attention-", "attention-most", "attentionmax", "attention-lazy1", "max", "attention-max-max",
     "attention-debiased-detrended"],
)  # fmt: skip
def test_unknown_scores(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown score .* or attention with options"):
        score_named(name)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="leave out text-rows or no-rope"):
        score_named("text-rows-no-rope")


@pytest.mark.parametrize("policy", ["fastv", "pyramiddrop", "st3"])
def test_schedules_take_any_score(policy: str) -> None:
    for score in SCORES:
        chosen = parse(f"{policy}:score={score}")
        assert chosen.scorer() == SCORES[score]
        assert parse(str(chosen)) == chosen


def test_lazy_layers_share_a_score() -> None:
    sources = [Attention(lazy=4).source(layer) for layer in range(12)]
    assert sources == [0, 1, 2, 2, 2, 2, 6, 6, 6, 6, 10, 10]
    assert [Attention().source(layer) for layer in range(4)] == [0, 1, 2, 3]


def test_divprune_spreads_and_cdpruner_prefers_what_is_asked_for() -> None:
    """Three clusters of three: the first picks come one from each; the relevant one comes first."""
    torch.manual_seed(0)
    centres = torch.eye(16)[:3]
    tokens = centres.repeat_interleave(3, 0) + 0.05 * torch.randn(9, 16)
    view = image_of(3, 3)
    view.visual = torch.tensor([[True] * 9 + [False] * 2])
    view.ordinal = torch.arange(11)[None]
    view.last = torch.tensor([10])
    view.hidden = torch.cat([tokens, centres[1:2], centres[1:2]])[None]
    assert {int(i) // 3 for i in score_named("divprune")(view)[0, :9].topk(3).indices} == {0, 1, 2}
    first = score_named("cdpruner")(view)[0, :9].argmax()
    assert int(first) // 3 == 1


def test_only_scores_of_embeddings_come_before_the_decoder() -> None:
    early = {name for name, score in SCORES.items() if stage_of(score) == "embeds"}
    assert early >= {"divprune", "cdpruner", "visionzip", "grid", "uniform", "random"}


# -- arguments ----------------------------------------------------------------------------------


def test_layers_and_shares_as_strings() -> None:
    policy = parse("sparsevlm:layers=3/7/16,keep=0.5/0.3/0.2")
    assert policy == st3.SparseVLM(layers=(3, 7, 16), keep=(0.5, 0.3, 0.2))
    assert parse(str(policy)) == policy
    assert st3.V2Drop().layers_for(32) == (3, 17, 22)
    assert st3.V2Drop().layers_for(16) == (2, 8, 11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st3.SparseVLM(layers=(3, 7)), "2 layers and 3 shares"),
        (lambda: st3.SparseVLM(layers=(7, 3, 9)), "layers must rise"),
        (lambda: st3.SparseVLM(layers=(0, 3, 9)), "start at 1 or later"),
        (lambda: st3.SparseVLM(keep=(0.2, 0.3, 0.1)), "keep must fall"),
        (lambda: st3.SparseVLM(keep=(2.0, 0.3, 0.1)), "between 0 and 1"),
        (lambda: st3.SparseVLM(keep=0.5), "must be tuples"),  # type: ignore[arg-type]
        (lambda: st3.SparseVLM().schedule(3), "do not fit 3"),
        (lambda: st3.SparseVLM(layers=(3, 7, 16)).schedule(16), "use at most 15"),
        (lambda: st3.DART(image_pivots=0), "image_pivots must be"),
        (lambda: st3.FEATHER(stride=0), "stride must be"),
        (lambda: st3.VisionZip(dominant=2), "dominant must lie"),
        (lambda: st3.DivPrune(keep=-1), "keep must lie"),
        (lambda: st3.DyCoke(every=0), "every must be"),
        (lambda: st3.DyCoke(layer=8).schedule(8), "use at most 7"),
        (lambda: st3.FastV(score="looks"), "unknown score"),
        (lambda: st3.PyramidDrop(score="looks"), "unknown score"),
        (lambda: parse("sparsevlm:layers=3/x/9"), "counted from 0, got 'x'"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
