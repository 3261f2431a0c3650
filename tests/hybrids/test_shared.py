"""Decoders whose last layers share KV entries (Gemma 4 E, Gemma 3n), late image features (Granite 4
Vision), and a plain one that has no tiny tower (Apertus 1.5)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import st3
from st3.engine.mixed import MixedPrefill
from st3.engine.mixed_steps import MixedStep
from st3.hf.cache import stores_of
from st3.hf.call import CACHE, cache_of
from tests.hybrids.cases import (
    LONG,
    POLICIES,
    check_beams_and_sampling,
    compare,
    made,
    off_in_a_turn_of_text,
    off_without_a_cache,
    rows_for,
    slow,
)
from tests.slow_counts import Counts
from tests.slow_hybrids import text_of
from tests.zoo import HYBRIDS, I, T, V

SHARED = [n for n in ("gemma4_shared", "gemma3n") if n in HYBRIDS]
NAMES = [*SHARED, *(n for n in ("granite4_vision", "apertus1p5") if n in HYBRIDS)]
ALL = pytest.mark.parametrize("name", NAMES)
EACH_SHARED = pytest.mark.parametrize("name", SHARED)
TRIMMED = [name for name in POLICIES if name != "bare"]
STATIC, COUNTS = POLICIES["static"]


@cache
def noise(name: str, attention: str, ragged: bool) -> float:
    """The bare model's largest difference from the reference: what rounding does."""
    family, model = made(name, attention)
    return compare(family, model, rows_for(family), *POLICIES["bare"], ragged)


def limit(name: str, attention: str, ragged: bool) -> float:
    # Of one row eager attention is the reference's own, so that no noise would be seen.
    return 1e-5 + 6 * max(noise(name, kind, ragged) for kind in {attention, "sdpa"})


@ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "ragged"])
def test_the_bare_model_is_the_reference(name: str, attention: str, ragged: bool) -> None:
    assert noise(name, attention, ragged) < 2e-4


@ALL
@pytest.mark.parametrize("policy", TRIMMED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "ragged"])
def test_tokens_are_removed(name: str, policy: str, attention: str, ragged: bool) -> None:
    """The reference sends the kept tokens through the layers that share; the engine none."""
    family, model = made(name, attention)
    worst = compare(family, model, rows_for(family), *POLICIES[policy], ragged)
    assert worst < limit(name, attention, ragged)


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "ragged"])
@pytest.mark.parametrize("name", SHARED)
def test_prompts_beyond_the_window(name: str, ragged: bool) -> None:
    family, model = made(name, "sdpa")
    rows = LONG if family.dynamic_size and name != "gemma4_shared" else [
        [T(30), I(), T(20)], [T(20), I(), T(9), I(), T(16)], [T(40)],
    ]  # fmt: skip
    worst = compare(family, model, rows, *POLICIES["anneal"], ragged)
    assert worst < 10 * limit(name, "sdpa", ragged)


@EACH_SHARED
def test_no_visual_token_enters_the_layers_that_share(name: str) -> None:
    family, model = made(name, "sdpa")
    batch = family.inputs(model, rows_for(family), only=0)
    widths: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        widths.append(args[0].shape[-2])

    hook = None
    try:
        with st3.trim(model, STATIC) as trimmer, torch.no_grad():
            layer = model.model.language_model.layers[-1]
            hook = layer.register_forward_pre_hook(note, with_kwargs=True)
            out = model(**batch, use_cache=True, logits_to_keep=2)
            first = trimmer.wiring.first_shared
            assert first == 5
            assert trimmer.report.kept[0][first:] == (0,) * 3
    finally:
        if hook is not None:
            hook.remove()
    text = batch["input_ids"].shape[1] - 12
    assert widths == [text]
    assert list(stores_of(cache_of(out))) == list(range(first))


@EACH_SHARED
def test_a_policy_that_drops_nothing_drops_nothing_here_either(name: str) -> None:
    family, model = made(name, "sdpa")
    batch = family.inputs(model, rows_for(family))
    with torch.no_grad():
        bare = model(**batch).logits
        with st3.trim(model, "none"):
            assert torch.equal(model(**batch).logits, bare)
        with st3.trim(model, "none", own_cache=True):
            valid = batch["attention_mask"].bool()
            torch.testing.assert_close(model(**batch).logits[valid], bare[valid], atol=1e-4, rtol=0)


@EACH_SHARED
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_drops_before_and_behind_each_kind_of_layer(name: str, layer: int) -> None:
    family, model = made(name, "sdpa")
    counts = Counts(layer, 0.5, 0.5)
    worst = compare(family, model, rows_for(family), st3.FastV(layer=layer), counts, True)
    assert worst < limit(name, "sdpa", True)


@ALL
def test_a_turn_of_text(name: str) -> None:
    """Gemma 4 goes on with the turn's last column alone."""
    assert off_in_a_turn_of_text(name) < limit(name, "sdpa", False)


@ALL
def test_a_new_image_in_a_later_turn(name: str) -> None:
    family, model = made(name, "sdpa")
    rows = rows_for(family)
    first = family.inputs(model, rows, only=0)
    second = family.inputs(model, [[T(3), I(2, 4), T(5)]], seed=5)
    visual = family.visual_mask(model, second)
    second.pop("mm_token_type_ids", None)
    start, new = first["input_ids"].shape[1] + 3, second["input_ids"].shape[1] + 1
    with st3.trim(model, STATIC), torch.no_grad():
        out = model.generate(
            **first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        again = {
            **second,
            "input_ids": torch.cat([out.sequences[:, -1:], second["input_ids"]], 1),
            "attention_mask": torch.ones(1, start + new, dtype=torch.long),
            "position_ids": torch.arange(start, start + new)[None],
        }
        got = model(**again, use_cache=True, **{CACHE: cache_of(out)}).logits[0, -1]
    row = slow(family, model, rows, 0, COUNTS, 4)
    wanted = row.show(again, torch.nn.functional.pad(visual[0], (1, 0)))
    assert (got - wanted).abs().max() < limit(name, "sdpa", False)


@ALL
def test_forward_without_a_cache(name: str) -> None:
    assert off_without_a_cache(name) < limit(name, "sdpa", True)


@ALL
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_beams_and_sampling(name: str, options: dict[str, Any]) -> None:
    check_beams_and_sampling(name, options)


@ALL
def test_training(name: str) -> None:
    """Gradients are finite where the bare model's are: Gemma 3n's embeddings get NaN from padding,
    and from what images stand in the place of."""
    family, model = HYBRIDS[name], HYBRIDS[name].model()
    batch = family.inputs(model, rows_for(family)[:1])
    model.train()

    def finite(policy: Any) -> set[str]:
        model.zero_grad()
        with st3.trim(model, policy):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        found = text_of(model).named_parameters()
        return {key for key, p in found if p.grad is not None and torch.isfinite(p.grad).all()}

    trimmed, bare = finite(STATIC), finite("none")
    assert len(trimmed) > 50
    assert trimmed == bare


@pytest.mark.skipif("gemma4_shared" not in HYBRIDS, reason="not in this transformers")
@pytest.mark.parametrize("seed", range(8))
def test_gemma_4_with_prompt_lookup_is_plain_greedy(seed: int) -> None:
    family = HYBRIDS["gemma4_shared"]
    model = family.model(seed)
    solo = family.inputs(model, rows_for(family), only=1)  # (those of seed 1 end in what stands
    # before their image: even the bare model then takes a candidate for an image's token)
    given = {"max_new_tokens": 24, "do_sample": False}
    for policy in ("static", "anneal"):
        with st3.trim(model, POLICIES[policy][0]):
            plain = model.generate(**solo, **given)
            fast = model.generate(**solo, **given, prompt_lookup_num_tokens=3)
        assert torch.equal(fast, plain), policy


@pytest.mark.skipif("gemma4_shared" not in HYBRIDS, reason="not in this transformers")
def test_video() -> None:
    family, model = made("gemma4_shared", "sdpa")
    rows = [[T(3), V(), T(4)], [T(2), V(), T(2)], [T(5)]]
    worst = compare(family, model, rows, STATIC, COUNTS, True)
    assert worst < limit("gemma4_shared", "sdpa", True)


@EACH_SHARED
@pytest.mark.parametrize(
    "policy",
    [
        st3.DyCoke(layer=3, keep=0.3, every=3),
        st3.DivPrune(keep=0.4),
        st3.ST3(first_layer=2, final_keep=0.05, stride=1, score="hidden-change"),
        st3.SparseVLM(layers=(1, 3, 4), keep=(0.6, 0.4, 0.2)),
    ],
    ids=lambda policy: policy.name,
)
def test_other_methods(name: str, policy: st3.Policy) -> None:
    family, model = made(name, "sdpa")
    rows = rows_for(family)
    given = {"max_new_tokens": 9, "do_sample": False}
    with st3.trim(model, policy):
        together = model.generate(**family.inputs(model, rows), **given)[:, -9:]
        for i in range(len(rows)):
            alone = model.generate(**family.inputs(model, rows, only=i), **given)[:, -9:]
            assert torch.equal(together[i : i + 1], alone)


def test_flash_attention_is_refused() -> None:
    _, model = made(SHARED[-1])
    config = model.model.language_model.config
    before, config._attn_implementation = config._attn_implementation, "flash_attention_2"
    try:
        with pytest.raises(st3.UnsupportedModelError, match="share another one's KV entries"):
            st3.trim(model, STATIC).attach()
    finally:
        config._attn_implementation = before


# What breaks without each of the rules ----------------------------------------------------------


@pytest.mark.skipif("gemma4_shared" not in HYBRIDS, reason="not in this transformers")
@pytest.mark.parametrize("mutant", ["left", "ownmask"])
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``left``: rows begin, and do not end, in one column. ``ownmask``: in decoding a layer that
    shares asks its source's store anew, whose end has moved."""
    family, model = made("gemma4_shared", "sdpa")
    if mutant == "left":
        if not hasattr(model.model.language_model, "first_kv_shared_layer_idx"):
            pytest.skip("this transformers cuts no columns itself")
        real = MixedPrefill.__init__

        def begin(self: Any, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            self.ends_together = False

        monkeypatch.setattr(MixedPrefill, "__init__", begin)
    else:
        own = MixedStep._mask

        def mask(self: Any, layer: int, hidden: Any) -> Any:
            return own(self, self.plan.wiring.sources[layer], hidden)

        monkeypatch.setattr(MixedStep, "_mask", mask)
    try:
        worst = compare(family, model, rows_for(family), *POLICIES["anneal"], True)
    except (AssertionError, RuntimeError):
        return  # other tokens, or a mask of another size
    assert worst > 1000 * limit("gemma4_shared", "sdpa", True)


@pytest.mark.skipif("granite4_vision" not in HYBRIDS, reason="not in this transformers")
def test_late_features_belong_to_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those features the answer is another one."""
    family, model = made("granite4_vision", "sdpa")
    monkeypatch.setattr(MixedPrefill, "_with_late", lambda self, layer, hidden: hidden)
    try:
        worst = compare(family, model, rows_for(family), STATIC, COUNTS, True)
    except AssertionError:
        return
    assert worst > 1000 * limit("granite4_vision", "sdpa", True)


@pytest.mark.parametrize("name", [n for n in NAMES if n in ("gemma4_shared", "apertus1p5")])
def test_sounds_are_no_visual_tokens(name: str) -> None:
    family, model = made(name, "sdpa")
    batch = family.inputs(model, [[T(5), I(), T(6)]])
    visual = int(family.visual_mask(model, batch).sum())
    batch["input_ids"][0, -4:-2] = model.config.audio_token_id
    with st3.trim(model, STATIC) as trimmer, torch.no_grad():
        model(**batch)
    assert trimmer.report.n_visual == [visual]
