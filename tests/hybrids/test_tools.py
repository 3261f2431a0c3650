"""Decoders whose layers are not all alike under the tools: a server's joined rows, compiled steps,
analysis, recorded runs, benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import st3
from st3.hf.states import has_state, joined, place, row_of
from st3.tools.bench.measure import WeightsOnly, footprint
from st3.tools.bench.models import SHAPES, from_shape
from st3.tools.bench.prompts import Row, build
from st3.tools.see.record import record
from st3.tools.see.run import analyse
from st3.tools.see.watch import Watch, shown_by
from st3.tools.serve.budget import Budget, columns_at_peak, entry_bytes, row_bytes
from tests.hybrids.cases import POLICIES, made, rows_for
from tests.slow_hybrids import STATES
from tests.test_analysis import Notes, generate
from tests.test_analysis_record import Letters
from tests.test_serve_batch import Company
from tests.zoo import HYBRIDS, I, T

ALL = pytest.mark.parametrize("name", list(HYBRIDS))
ANNEAL = POLICIES["anneal"][0]
NONE = st3.parse("none")
assert ANNEAL is not None


def company(name: str) -> Company:
    return Company(*made(name, "sdpa"))


# Joined rows ------------------------------------------------------------------------------------


@ALL
def test_rows_of_any_age_and_policy_decode_together(name: str) -> None:
    """Each gets the logits that it gets alone; a row without an image and an untrimmed one too."""
    both = company(name)
    family, model, rows = both.family, both.model, rows_for(both.family)
    inputs = [family.inputs(model, rows, only=i) for i in range(4)]
    policies = [ANNEAL, st3.FastV(layer=4, drop=0.5), NONE, NONE]
    both.change([], {0: both.prefilled(0, inputs[0], policies[0])})
    both.step(3)
    both.change([], {i: both.prefilled(i, inputs[i], policies[i]) for i in (1, 2)})
    both.step(2)
    both.change([0], {3: both.prefilled(3, inputs[3], policies[3])})
    both.step(3)
    both.change([1], {})
    both.step(2)
    for i in range(4):
        got = torch.stack(both.logits[i])
        alone = both.alone(inputs[i], policies[i], len(got))
        assert torch.equal(got.argmax(-1), alone.argmax(-1)), i
        # (Delta nets: chunks of a prompt are summed in another order, see the noise of the tests
        # of states.)
        torch.testing.assert_close(got, alone, atol=1e-3, rtol=1e-3)


@ALL
def test_a_newcomer_takes_the_place_of_a_leaver(name: str) -> None:
    both = company(name)
    family, model = both.family, both.model
    rows = [[T(5), I(), T(4)], [T(2), I(), T(6)], [T(3), I(), T(2)]]
    inputs = [family.inputs(model, rows, only=i) for i in range(3)]
    both.change([], {i: both.prefilled(i, inputs[i], ANNEAL) for i in range(2)})
    both.step(3)
    buffer = both.batch.layers[0].filled.keys
    states = [layer for layer in both.batch.cache.layers if has_state(layer)]
    both.change([0], {2: both.prefilled(2, inputs[2], ANNEAL)})
    assert both.batch.layers[0].filled.keys is buffer  # the other row was not copied
    assert [layer for layer in both.batch.cache.layers if has_state(layer)] == states
    both.step(4)
    for i in range(3):
        got = torch.stack(both.logits[i])
        torch.testing.assert_close(
            got, both.alone(inputs[i], ANNEAL, len(got)), atol=1e-3, rtol=1e-3
        )


@ALL
def test_a_batch_never_holds_more_than_was_reserved(name: str) -> None:
    """KV entries and states: what a server's budget counts."""
    both = company(name)
    family, model, rows = both.family, both.model, rows_for(both.family)[:2]
    budget = Budget(1 << 40, entry_bytes(model, 8), states=row_bytes(model))
    needs, new, tokens = [], {}, 12
    for i in range(2):
        new[i] = both.prefilled(i, family.inputs(model, rows, only=i), ANNEAL)
        row = new[i].sequence
        needs.append(columns_at_peak(row.counts, row.prompt - new[i].visual, tokens))
    both.change([], new)
    for _ in range(tokens - 1):
        both.step()
        held = budget.bytes(needs)
        assert 0 < both.batch.allocated_bytes <= held
    assert both.batch.allocated_bytes > 0.3 * held
    types = getattr(model.config.text_config, "layer_types", None) or []
    assert (budget.states > 0) == any(kind in STATES for kind in types)
    both.change([0, 1], {})
    assert both.batch.allocated_bytes == 0


def test_states_of_rows_are_taken_out_and_put_in() -> None:
    name = next(n for n in ("qwen3_5", "lfm2_vl") if n in HYBRIDS)
    family, model = made(name)
    from st3.hf.call import cache_of

    with torch.no_grad():
        cache = cache_of(model(**family.inputs(model, [[T(9)], [T(9)]]), use_cache=True))
    layer = next(la for la in cache.layers if has_state(la))
    rows = [row_of(layer, i) for i in range(2)]
    swapped = joined(rows[::-1])
    assert torch.equal(swapped.conv_states[0], layer.conv_states[0].flip(0))
    place(swapped, 0, rows[0])
    assert torch.equal(swapped.conv_states[0][0], swapped.conv_states[0][1])
    swapped.reset()  # is a layer of its own
    assert layer.has_previous_state[0]
    assert layer.conv_states[0].abs().sum() > 0


# Compiled steps ---------------------------------------------------------------------------------


@ALL
@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True], ids=["solo", "ragged"])
def test_compiled_steps_give_the_answers_of_plain_ones(name: str, ragged: bool) -> None:
    """The backend "eager" traces one graph and runs it as it is."""
    family, model = made(name, "sdpa")
    batch = family.inputs(model, rows_for(family), only=None if ragged else 1)

    def run(**options: Any) -> Any:
        with st3.trim(model, ANNEAL, **options):
            return model.generate(
                **batch, max_new_tokens=14, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip

    plain, fast = run(), run(compile_decode={"backend": "eager"})
    assert torch.equal(fast.sequences, plain.sequences)
    torch.testing.assert_close(
        torch.stack(fast.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4
    )


# Analysis and recorded runs ---------------------------------------------------------------------


def test_layers_with_a_state_show_the_attention_by_which_tokens_are_ranked() -> None:
    assert shown_by((None, None, 2, None, 4)) == {2: [0, 1, 2, 3], 4: [4]}
    assert shown_by((0, 1, 0)) == {0: [0], 1: [1], 2: [2]}


@ALL
def test_watching_changes_nothing_and_hears_every_layer(name: str) -> None:
    family, model = made(name, "sdpa")
    batch = family.inputs(model, [[T(5), I(), T(4)]])
    bare = generate(model, batch, 3)
    notes = Notes()
    with Watch(model, notes):
        assert torch.equal(generate(model, batch, 3), bare)
    for heard in notes.heard[:-1]:
        assert sorted(heard) == list(range(8))
        for attention, columns in heard.values():
            assert attention.shape == columns.shape
            assert float(attention.sum()) == pytest.approx(1, abs=1e-5)
    with st3.trim(model, ANNEAL) as trimmer:
        plain, notes = generate(model, batch, 5), Notes()
        with Watch(model, notes):
            assert torch.equal(generate(model, batch, 5), plain)
        visual = notes.prompts[0].visual
        for step, heard in enumerate(notes.heard[:-1]):
            for layer in trimmer.wiring.own:
                seen = int(torch.isin(heard[layer][1], visual).sum())
                assert seen == trimmer.schedule.visible(layer, len(visual), step)


@ALL
def test_an_analysis(name: str) -> None:
    family, model = made(name, "sdpa")
    analysis = analyse(model, [(family.inputs(model, [[T(5), I(), T(4)]]), None)], 3)
    assert analysis.num_layers == 8
    assert all(sum(shares) == pytest.approx(1, abs=1e-4) for shares in analysis.prefill.shares)


@ALL
def test_a_recorded_run(name: str) -> None:
    family, model = made(name, "sdpa")
    batch = family.inputs(model, [[T(5), I(), T(4)]])
    count = int(family.visual_mask(model, batch).sum())
    trimmer = st3.trim(model, ANNEAL)
    run = record(trimmer, batch, Letters(), 5)
    for layer in trimmer.wiring.own:
        wanted = [trimmer.schedule.visible(layer, count, step) for step in range(5)]
        assert [visible[layer] for visible in run.visible] == wanted
        assert len(run.order[layer]) == trimmer.schedule.kept(layer, count)


# Benchmarks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ("cpu-qwen3.5", "cpu-gemma4-shared") if n in SHAPES])
def test_shapes_of_the_bench(name: str) -> None:
    """What benchmarks/hybrids.py measures."""
    config = SHAPES[name].config
    assert st3.cost.TextDims.from_config(config).num_layers == 16


@pytest.mark.parametrize("name", [n for n in ("tiny-qwen3.5", "tiny-gemma4-shared") if n in SHAPES])
def test_footprints_of_the_bench(name: str) -> None:
    subject = from_shape(name, torch.device("cpu"), torch.float32)
    prompt = build([Row(8, (24,))] * 2, subject.vocab, torch.device("cpu"))
    spare = WeightsOnly(subject.model, 2)
    held = footprint(subject.model, prompt, 4, spare)
    with st3.trim(subject.model, "st3", visual_mask=prompt.visual):
        less = footprint(subject.model, prompt, 4, spare)
    assert 0 < less.kv_live[0] < held.kv_live[0]
