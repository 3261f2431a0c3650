"""Decoders in which an index chooses the keys that each query sees: a static trim, no annealing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import st3
from st3.engine.plan import lay_out
from st3.engine.wiring import Wiring
from st3.hf.call import CACHE, cache_of
from st3.hf.indexed import IndexedLayer
from st3.tools.see.watch import Watch
from tests.hybrids.cases import POLICIES, compare, made, slow
from tests.slow_counts import Counts
from tests.test_analysis import Notes, generate
from tests.zoo import INDEXED, I, T

ALL = pytest.mark.parametrize("name", list(INDEXED))
# Rows of one length, that lose as many tokens. One of these families takes no others; in the others
# keys whose index scores are equal (half of them are 0, behind a ReLU) are chosen by column, which
# padding moves: also the bare model then answers otherwise.
EVEN = [[T(5), I(), T(7), I(), T(9)], [T(9), I(), T(4), I(), T(8)], [T(3), I(), T(15), I(), T(3)]]
RAGGED = [[T(5), I(), T(4)], [T(3), I(), T(2), I(), T(6)], [T(20)], [T(2), I(), T(3)]]
STATIC, COUNTS = POLICIES["static"]
ANNEAL, _ = POLICIES["anneal"]
TRIMMED: dict[str, tuple[Any, Counts]] = {
    "static": POLICIES["static"],
    "anneal": (ANNEAL, Counts(3, 0.4, 0.1, 2)),  # of which the annealing is left out
    "fastv": POLICIES["fastv"],
    "late": (st3.FastV(layer=5, drop=0.8), Counts(5, 0.8, 0.2)),
}


def kernel(name: str) -> str:
    """sdpa knows no learned sinks."""
    return "eager" if name == "hy_v4_vl" else "sdpa"


@cache
def limit(name: str, attention: str, ragged: bool) -> float:
    family, model = made(name, attention)
    worst = compare(family, model, EVEN, *POLICIES["bare"], ragged)
    assert worst < 2e-4
    return 1e-5 + 6 * worst


@ALL
@pytest.mark.parametrize("policy", TRIMMED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "batch"])
def test_tokens_are_removed(name: str, policy: str, attention: str, ragged: bool) -> None:
    if attention == "sdpa" != kernel(name):
        pytest.skip("sdpa knows no learned sinks")
    family, model = made(name, attention)
    worst = compare(family, model, EVEN, *TRIMMED[policy], ragged)
    assert worst < limit(name, attention, ragged)


@ALL
def test_the_report_says_what_is_left_out(name: str) -> None:
    family, model = made(name, kernel(name))
    with st3.trim(model, ANNEAL) as trimmer:
        model.generate(**family.inputs(model, EVEN), max_new_tokens=2)
        report = trimmer.report
    assert report.not_annealed
    assert "not annealed" in str(report)
    assert report.to_dict()["not_annealed"]
    borrows = [i for i, borrowed in enumerate(trimmer.parts.borrows) if borrowed]
    assert report.put_off == tuple(i for i in (3, 5, 7) if i in borrows)
    for layer in borrows:  # sees what the layer sees whose index it goes by
        assert report.kept[0][layer] == report.kept[0][layer - 1]


@ALL
def test_what_no_index_can_stand_is_refused(name: str) -> None:
    _, model = made(name, kernel(name))
    with pytest.raises(st3.UnsupportedModelError, match="would do nothing here"):
        st3.trim(model, POLICIES["anneal_only"][0])
    with pytest.raises(st3.UnsupportedModelError, match="leave rerank_every"):
        st3.trim(model, "st3", rerank_every=2)
    with pytest.raises(st3.UnsupportedModelError, match="leave rerank_every and recall_every"):
        st3.trim(model, st3.DyCoke(layer=5, keep=0.3, every=3))
    with pytest.raises(st3.UnsupportedModelError, match="leave compile_decode at None"):
        st3.trim(model, STATIC, compile_decode="default").attach()


@pytest.mark.skipif("minimax_m3_vl" not in INDEXED, reason="not in this transformers")
def test_padding_that_an_index_would_count_is_refused() -> None:
    family, model = made("minimax_m3_vl", "sdpa")
    for rows in (RAGGED, [[T(5), I(), T(16)], [T(3), I(), T(2), I(), T(2)]]):
        with st3.trim(model, STATIC), pytest.raises(st3.UnsupportedModelError, match="one by one"):
            model(**family.inputs(model, rows))


@pytest.mark.parametrize("name", [n for n in INDEXED if n != "minimax_m3_vl"])
def test_padded_batches(name: str) -> None:
    family, model = made(name, kernel(name))
    with st3.trim(model, STATIC) as trimmer:
        out = model.generate(**family.inputs(model, RAGGED), max_new_tokens=6, do_sample=False)
        kept = trimmer.report.kept
    assert out.shape[0] == len(RAGGED)
    assert [row[-1] for row in kept] == [trimmer.schedule.kept(7, n) for n in (12, 24, 0, 12)]


@pytest.mark.skipif("mistral_large4" not in INDEXED, reason="not in this transformers")
def test_shared_entries_under_an_index_are_refused() -> None:
    config = INDEXED["mistral_large4"].make_config()
    config.text_config.kv_source_layers = [0, 0, 2, 3, 4, 5, 6, 7]
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(st3.UnsupportedModelError, match="none can see fewer tokens"):
        st3.trim(model, "fastv")


@ALL
def test_own_caches_that_drop_nothing_change_nothing(name: str) -> None:
    family, model = made(name, kernel(name))
    batch = family.inputs(model, EVEN)
    given = {"max_new_tokens": 8, "do_sample": False}
    bare = model.generate(**batch, **given)
    with st3.trim(model, "none", own_cache=True):
        assert torch.equal(model.generate(**batch, **given), bare)
    with st3.trim(model, "none", own_cache=True):
        cache = cache_of(model(**batch, use_cache=True))
        assert any(isinstance(layer, IndexedLayer) for layer in cache.layers)


@ALL
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_beams_and_sampling(name: str, options: dict[str, Any]) -> None:
    family, model = made(name, kernel(name))
    given = {"max_new_tokens": 8, "do_sample": False, **options}

    def run(only: int | None = None) -> Any:
        torch.manual_seed(0)
        return model.generate(**family.inputs(model, EVEN, only=only), **given)[:, -8:]

    bare = run()
    with st3.trim(model, STATIC):
        trimmed = run()
        assert not torch.equal(trimmed, bare)
        if "num_beams" in options:
            assert torch.equal(trimmed, torch.cat([run(i) for i in range(len(EVEN))]))


@ALL
def test_prompt_lookup(name: str) -> None:
    """Candidates that do not hold are taken back, their index keys with them."""
    family, model = made(name, kernel(name))
    solo = family.inputs(model, EVEN, only=1)
    given = {"max_new_tokens": 24, "do_sample": False}
    looks = {**given, "prompt_lookup_num_tokens": 3}
    bare = model.generate(**solo, **looks)
    with st3.trim(model, "none", own_cache=True):
        assert torch.equal(model.generate(**solo, **looks), bare)
    with st3.trim(model, STATIC):
        plain, fast = model.generate(**solo, **given), model.generate(**solo, **looks)
    if name != "mistral_large4":  # whose untrimmed answers are not the plain ones either
        assert torch.equal(fast, plain)


@ALL
def test_bf16(name: str) -> None:
    family, model = INDEXED[name], INDEXED[name].model().to(torch.bfloat16)
    batch = family.inputs(model, EVEN)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    with st3.trim(model, STATIC):
        out = model.generate(
            **batch, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
        )
    assert all(torch.isfinite(logits).all() for logits in out.logits)


@ALL
def test_turns_of_text_and_of_an_image(name: str) -> None:
    family, model = made(name, kernel(name))
    solo = family.inputs(model, EVEN, only=1)
    second = family.inputs(model, [[T(3), I(), T(5)]], seed=5)
    start, new = solo["input_ids"].shape[1] + 3, second["input_ids"].shape[1] + 1
    more = torch.tensor([[40, 50, 60, 70, 80]])
    four = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with st3.trim(model, STATIC), torch.no_grad():
        out = model.generate(**solo, **four)
        ids = torch.cat([out.sequences[:, -1:], more], 1)
        text = model(input_ids=ids, logits_to_keep=1, **{CACHE: cache_of(out)}).logits[0, -1]
        out = model.generate(**solo, **four)
        again = {
            **second,
            "input_ids": torch.cat([out.sequences[:, -1:], second["input_ids"]], 1),
            "attention_mask": torch.ones(1, start + new, dtype=torch.long),
            "position_ids": torch.arange(start, start + new)[None],
        }
        image = model(**again, use_cache=True, **{CACHE: cache_of(out)}).logits[0, -1]
    wanted = slow(family, model, EVEN, 1, COUNTS, 4).append(ids)
    assert (text - wanted).abs().max() < limit(name, kernel(name), False)
    visual = torch.nn.functional.pad(family.visual_mask(model, second)[0], (1, 0))
    wanted = slow(family, model, EVEN, 1, COUNTS, 4).show(again, visual)
    assert (image - wanted).abs().max() < limit(name, kernel(name), False)


@ALL
def test_forward_without_a_cache_and_training(name: str) -> None:
    family, model = INDEXED[name], INDEXED[name].model()
    with st3.trim(model, STATIC), torch.no_grad():
        got = model(**family.inputs(model, EVEN), use_cache=False).logits[:, -1]
    for i, logits in enumerate(got):
        wanted = slow(family, model, EVEN, i, COUNTS, 1).logits[0]
        assert (logits - wanted).abs().max() < limit(name, kernel(name), True)
    model.train()
    batch = family.inputs(model, EVEN)
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.23 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    with st3.trim(model, STATIC):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.model.language_model.parameters() if p.grad is not None]
    assert len(gradients) > 50
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@ALL
def test_watching_changes_nothing(name: str) -> None:
    family, model = made(name, kernel(name))
    if name == "hy_v4_vl":
        with pytest.raises(st3.UnsupportedModelError, match="learned sinks"), Watch(model, Notes()):
            generate(model, family.inputs(model, EVEN, only=0), 2)
        return
    batch = family.inputs(model, [[T(5), I(), T(4)]])
    with st3.trim(model, STATIC):
        plain, notes = generate(model, batch, 4), Notes()
        with Watch(model, notes):
            assert torch.equal(generate(model, batch, 4), plain)
    assert all(sorted(heard) == list(range(8)) for heard in notes.heard[:-1])


@pytest.mark.parametrize("name", [n for n in INDEXED if n != "minimax_m3_vl"])
def test_without_a_cost_model_a_report_has_no_flops(name: str) -> None:
    family, model = made(name, kernel(name))
    with pytest.raises(ValueError, match="no cost model"):
        st3.cost.TextDims.from_config(model.config)
    with st3.trim(model, STATIC) as trimmer:
        model.generate(**family.inputs(model, EVEN), max_new_tokens=2)
    assert trimmer.report.prefill_flops is None
    assert trimmer.report.kv_live_bytes < trimmer.report.kv_untrimmed_bytes


@pytest.mark.skipif("minimax_m3_vl" not in INDEXED, reason="not in this transformers")
def test_a_cost_model_knows_that_nothing_is_annealed() -> None:
    family, model = made("minimax_m3_vl", "sdpa")
    dims = st3.cost.TextDims.from_config(model.config)
    assert dims.in_order
    with st3.trim(model, ANNEAL) as trimmer:
        model.generate(**family.inputs(model, EVEN), max_new_tokens=2)
        assert trimmer.schedule == lay_out(ANNEAL, Wiring(dims.sources, dims.in_order))
    assert 0 < trimmer.report.prefill_flops_ratio < 1
