"""Decoders with states: linear attention (Qwen3.5, MiniCPM-V 4.6), short convolutions (LFM2-VL)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import st3
from st3.engine.mixed import MixedPrefill
from st3.engine.ranker import Ranker
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
from tests.slow_hybrids import STATES as SLOW_STATES
from tests.slow_hybrids import text_of
from tests.zoo import HYBRIDS, I, T, V

STATES = [name for name in HYBRIDS if not name.startswith(("gemma", "granite", "apertus"))]
ALL = pytest.mark.parametrize("name", STATES)
TRIMMED = [name for name in POLICIES if name != "bare"]
STATIC, COUNTS = POLICIES["static"]


@cache
def noise(name: str, attention: str, ragged: bool, long: bool) -> float:
    """The bare model's largest difference from the reference: what rounding does."""
    family, model = made(name, attention)
    return compare(family, model, LONG if long else rows_for(family), *POLICIES["bare"], ragged)


def limit(name: str, attention: str, ragged: bool, long: bool = False) -> float:
    return 2e-5 + 6 * noise(name, attention, ragged, long)


@ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "ragged"])
def test_the_bare_model_is_the_reference(name: str, attention: str, ragged: bool) -> None:
    assert noise(name, attention, ragged, False) < 1e-3


@ALL
@pytest.mark.parametrize("policy", TRIMMED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "ragged"])
def test_tokens_are_removed(name: str, policy: str, attention: str, ragged: bool) -> None:
    """Rows lose different numbers of tokens; one has no image, one two."""
    family, model = made(name, attention)
    worst = compare(family, model, rows_for(family), *POLICIES[policy], ragged)
    assert worst < limit(name, attention, ragged)


@ALL
@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "ragged"])
def test_prompts_of_several_chunks(name: str, ragged: bool) -> None:
    family, model = made(name, "sdpa")
    worst = compare(family, model, LONG, *POLICIES["anneal"], ragged)
    assert worst < limit(name, "sdpa", ragged, long=True)


@ALL
@pytest.mark.parametrize("layer", [1, 3, 4, 5, 7])
def test_drops_before_and_behind_a_softmax_layer(name: str, layer: int) -> None:
    """Also in the first layers, where nothing can be ranked yet."""
    family, model = made(name, "sdpa")
    counts = Counts(layer, 0.5, 0.5)
    worst = compare(family, model, rows_for(family), st3.FastV(layer=layer), counts, True)
    assert worst < limit(name, "sdpa", True)


@ALL
def test_the_report_says_where_drops_were_put_off_to(name: str) -> None:
    family, model = made(name)
    batch = family.inputs(model, rows_for(family), only=0)
    first = 1 + model.config.text_config.layer_types.index("full_attention")
    with st3.trim(model, STATIC) as trimmer:
        model.generate(**batch, max_new_tokens=2)
        report = trimmer.report
    assert report.put_off == tuple(range(2, first))
    assert report.first_drop == first
    counted = [COUNTS.kept(layer, 8, first, 12) for layer in range(8)]
    assert list(report.kept[0]) == counted
    text = ", ".join(map(str, report.put_off))
    assert f"put off         drops before layer {text}, to layer {first}" in str(report)
    assert report.to_dict()["put_off"] == report.put_off
    with st3.trim(model, st3.FastV(layer=first)) as trimmer:
        model.generate(**batch, max_new_tokens=2)
    assert trimmer.report.put_off == ()
    assert "put off" not in str(trimmer.report)


@ALL
def test_only_layers_with_entries_are_exchanged(name: str) -> None:
    family, model = made(name)
    batch = family.inputs(model, rows_for(family), only=0)
    with st3.trim(model, STATIC) as trimmer:
        out = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    cache = cache_of(out)
    types = model.config.text_config.layer_types
    assert list(stores_of(cache)) == [i for i, t in enumerate(types) if t not in SLOW_STATES]
    assert cache.get_seq_length() == batch["input_ids"].shape[1] + 2
    sizes = trimmer.report.entry_bytes
    assert [size > 0 for size in sizes] == [t not in SLOW_STATES for t in types]
    assert trimmer.report.kv_live_bytes < trimmer.report.kv_untrimmed_bytes


@ALL
def test_a_state_never_saw_what_was_dropped(name: str) -> None:
    """All visual tokens leave before a layer with a state, which then is as without them."""
    family, model = made(name, "sdpa")
    batch = family.inputs(model, [[T(5), I(3, 4), T(4)]])
    types = model.config.text_config.layer_types
    layer = next(i for i, kind in enumerate(types) if i and types[i - 1] == "full_attention")
    with st3.trim(model, st3.FastV(layer=layer, drop=1.0)), torch.no_grad():
        out = model(**batch, use_cache=True)
    state = cache_of(out).layers[layer]
    row = slow(family, model, [[T(5), I(3, 4), T(4)]], 0, Counts(layer, 1.0, 0.0), 1)
    wanted = row.cache.layers[layer]
    for index, conv in wanted.conv_states.items():
        torch.testing.assert_close(state.conv_states[index], conv, atol=2e-5, rtol=1e-4)
        if wanted.recurrent_states[index] is not None:
            torch.testing.assert_close(
                state.recurrent_states[index], wanted.recurrent_states[index], atol=2e-5, rtol=1e-4
            )


# Modes ------------------------------------------------------------------------------------------


@ALL
def test_a_turn_of_text(name: str) -> None:
    assert off_in_a_turn_of_text(name) < limit(name, "sdpa", False)


@ALL
def test_forward_without_a_cache(name: str) -> None:
    assert off_without_a_cache(name) < limit(name, "sdpa", True)


@ALL
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_beams_and_sampling(name: str, options: dict[str, Any]) -> None:
    check_beams_and_sampling(name, options)


@ALL
def test_training(name: str) -> None:
    """Finite gradients everywhere, the same with checkpoints."""
    family, model = HYBRIDS[name], HYBRIDS[name].model()
    batch = family.inputs(model, rows_for(family))
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with st3.trim(model, STATIC):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        found = text_of(model).named_parameters()
        return {name: p.grad.clone() for name, p in found if p.grad is not None}

    plain = gradients()
    assert len(plain) > 50
    assert all(torch.isfinite(gradient).all() for gradient in plain.values())
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.23 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, atol=1e-4, rtol=1e-3)


@ALL
def test_bf16(name: str) -> None:
    """Near the float model: no further from it than the bare model is."""
    family, model = HYBRIDS[name], HYBRIDS[name].model()
    rows = rows_for(family)

    def first(dtype: torch.dtype, policy: Any) -> torch.Tensor:
        batch = family.inputs(model.to(dtype), rows)
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad(), st3.trim(model, policy):
            return model(**batch).logits[:, -1].float()

    off = {}
    for policy in ("none", st3.FastV(layer=4, drop=0.5, score="uniform")):
        exact = first(torch.float32, policy)
        off[str(policy)] = float((first(torch.bfloat16, policy) - exact).abs().mean())
    none, trimmed = off.values()
    assert trimmed < 2 * none + 0.05


@ALL
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (POLICIES["anneal"][0], {"per_image": True}),
        (st3.DyCoke(layer=5, keep=0.3, every=3), {}),
        (st3.ST3(first_layer=3, final_keep=0.05, stride=2, score="key_norm"), {}),
        (st3.ST3(first_layer=3, final_keep=0.05, stride=2, score="text-rows"), {}),
        (st3.ST3(first_layer=3, final_keep=0.05, stride=2, score="hidden-change"), {}),
        (st3.DivPrune(keep=0.4), {}),
        (st3.DART(layers=(4, 6, 7), keep=(0.6, 0.4, 0.3)), {}),
        (st3.SparseVLM(layers=(1, 3, 5), keep=(0.6, 0.4, 0.2)), {}),
        (st3.FEATHER(layers=(2, 4), keep=(0.6, 0.2)), {}),
    ],
    ids=lambda value: str(value)[:24],
)
def test_other_methods(name: str, policy: st3.Policy, options: dict[str, Any]) -> None:
    """Rows of a batch give the tokens of each alone."""
    family, model = made(name, "sdpa")
    rows = rows_for(family)
    given = {"max_new_tokens": 9, "do_sample": False}
    with st3.trim(model, policy, **options):
        together = model.generate(**family.inputs(model, rows), **given)[:, -9:]
        for i in range(len(rows)):
            alone = model.generate(**family.inputs(model, rows, only=i), **given)[:, -9:]
            assert torch.equal(together[i : i + 1], alone)


@ALL
def test_a_new_image_in_a_later_turn(name: str) -> None:
    """Its tokens are dropped as a prompt's are, by counts of its own."""
    family, model = made(name, "sdpa")
    rows = rows_for(family)
    first = family.inputs(model, rows, only=0)
    second = family.inputs(model, [[T(3), I(2, 4), T(5)]], seed=5)
    visual = family.visual_mask(model, second)
    second.pop("mm_token_type_ids", None)  # positions behind a cache are plain ones
    start, new = first["input_ids"].shape[1] + 3, second["input_ids"].shape[1] + 1
    with st3.trim(model, STATIC) as trimmer, torch.no_grad():
        out = model.generate(
            **first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        places = torch.arange(start, start + new)[None]
        deltas = getattr(getattr(model, "model", None), "rope_deltas", None)
        if deltas is not None:
            places = (places + deltas).expand(3, -1, -1)
        again = {
            **second,
            "input_ids": torch.cat([out.sequences[:, -1:], second["input_ids"]], 1),
            "attention_mask": torch.ones(1, start + new, dtype=torch.long),
            "position_ids": places,
        }
        got = model(**again, use_cache=True, **{CACHE: cache_of(out)}).logits[0, -1]
        assert trimmer.report.n_visual == [int(visual.sum())]
    row = slow(family, model, rows, 0, COUNTS, 4)
    wanted = row.show(again, torch.nn.functional.pad(visual[0], (1, 0)))
    assert (got - wanted).abs().max() < limit(name, "sdpa", False)


@pytest.mark.skipif("lfm2_vl" not in HYBRIDS, reason="not in this transformers")
@pytest.mark.parametrize("policy", ["static", "anneal"])
def test_prompt_lookup_with_convolutions(policy: str) -> None:
    """generate() itself refuses assisted decoding where there are recurrences."""
    family, model = made("lfm2_vl", "sdpa")
    solo = family.inputs(model, rows_for(family), only=1)
    given = {"max_new_tokens": 24, "do_sample": False}
    with st3.trim(model, POLICIES[policy][0]):
        plain = model.generate(**solo, **given)
        assert torch.equal(model.generate(**solo, **given, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("name", [n for n in STATES if HYBRIDS[n].supports_video])
def test_video(name: str) -> None:
    family, model = made(name, "sdpa")
    rows = [[T(3), V(), T(4)], [T(2), V(), T(2)], [T(5)]]
    worst = compare(family, model, rows, STATIC, COUNTS, True)
    assert worst < limit(name, "sdpa", True)


# What breaks without each of the rules ----------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ("qwen3_5", "lfm2_vl") if n in HYBRIDS])
@pytest.mark.parametrize("mutant", ["left", "nomask", "stale"])
def test_mutants_are_caught(name: str, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``left``: rows begin, and do not end, in one column. ``nomask``: states take in padding.
    ``stale``: a drop behind a state goes by a score that lost its columns."""
    family, model = made(name, "sdpa")
    if mutant == "left":
        begin = MixedPrefill.__init__

        def begins_together(self: Any, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            self.ends_together = False

        monkeypatch.setattr(MixedPrefill, "__init__", begins_together)
    elif mutant == "nomask":
        real = MixedPrefill._narrow_mask

        def unmasked(self: Any, layer: int, mask: Any, hidden: Any) -> Any:
            found = real(self, layer, mask, hidden)
            return None if self.plan.wiring.states[layer] else found

        monkeypatch.setattr(MixedPrefill, "_narrow_mask", unmasked)
    else:

        def dropped(self: Any, columns: Any) -> None:
            if self._carried is not None:
                self._carried = self._carried[:, : columns.shape[1]]

        monkeypatch.setattr(Ranker, "dropped", dropped)
    try:
        worst = compare(family, model, rows_for(family), STATIC, COUNTS, True)
    except AssertionError:
        return  # other tokens
    assert worst > 1000 * limit(name, "sdpa", True)
