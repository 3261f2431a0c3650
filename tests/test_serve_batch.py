"""Rows that join and leave a running batch get the logits that they get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import st3
from st3.engine.kv.joined import visible_counts
from st3.models import families
from st3.tools.serve.batch import JoinedBatch, Prefilled, prefill
from st3.tools.serve.budget import Budget, columns_at_peak, entry_bytes
from tests.helpers import ANNEAL, POLICIES, assert_same, rows_for
from tests.zoo import FAMILIES, Family, I, T, build

NAMES = ["llava", "qwen2_5_vl", "gemma3", "smolvlm"]
_TYPES = {family.model_type for family in families()}
SUPPORTED = [name for name, f in FAMILIES.items() if (f.model_type or name) in _TYPES]
RERANKED = st3.ST3(first_drop=0.3, final_keep=0.2, stride=2, anneal=ANNEAL, rerank_every=2)


class Company:
    """A model that answers prompts alone, and together with others."""

    def __init__(self, family: Family, model: Any) -> None:
        self.family, self.model = family, model
        self.decoder = st3.trim(model, "none", own_cache=True)
        self.batch = JoinedBatch(model, self.decoder.parts.windows)
        self.names: list[int] = []
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, list[Tensor]] = {}

    def alone(self, inputs: Any, policy: st3.Policy, tokens: int) -> Tensor:
        """[tokens, V] of generate()."""
        with torch.no_grad(), st3.trim(self.model, policy):
            out = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(out.logits, 1)[0].float()

    def prefilled(self, name: int, inputs: Any, policy: st3.Policy) -> Prefilled:
        trimmer = st3.trim(self.model, policy)
        with torch.no_grad(), self.decoder:
            if not trimmer.active:
                prompt = prefill(self.model, inputs, self.decoder)
            else:
                with trimmer:
                    prompt = prefill(self.model, inputs, trimmer)
        self.tokens[name], self.logits[name] = [int(prompt.logits.argmax())], [prompt.logits]
        return prompt

    def change(self, leaving: list[int], new: dict[int, Prefilled]) -> None:
        places = {self.names.index(name) for name in leaving}
        by_row = {id(row): name for row, name in zip(self.batch.rows, self.names, strict=True)}
        by_row.update((id(prompt.sequence), name) for name, prompt in new.items())
        self.batch.change(places, list(new.values()))
        self.names = [by_row[id(row)] for row in self.batch.rows]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            with torch.no_grad(), self.decoder:
                logits = self.batch.step([self.tokens[name][-1] for name in self.names])
            for name, row in zip(self.names, logits, strict=True):
                self.tokens[name].append(int(row.argmax()))
                self.logits[name].append(row)


def company(name: str) -> Company:
    return Company(*build(name))


@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_come_and_go_in_every_family(name: str) -> None:
    both = company(name)
    family, model = both.family, both.model
    rows = rows_for(family)
    rows = [rows[0], rows[-1]]
    inputs = [family.inputs(model, rows, only=i) for i in range(2)]
    policies = [POLICIES["st3"], POLICIES["none"]]
    both.change([], {0: both.prefilled(0, inputs[0], policies[0])})
    both.step()
    both.change([], {1: both.prefilled(1, inputs[1], policies[1])})
    both.step(2)
    both.change([1], {})
    both.step()
    for i in range(2):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], policies[i], len(got)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", [*POLICIES, "reranked"])
def test_every_policy_keeps_its_own_clock(name: str, policy: str) -> None:
    """Two rows of one policy, of different lengths and ages, past the end of the annealing."""
    both = company(name)
    chosen = RERANKED if policy == "reranked" else POLICIES[policy]
    if chosen.recalls:
        pytest.skip("the engine refuses policies that recall")
    try:
        st3.trim(both.model, chosen)
    except st3.UnsupportedModelError as error:
        pytest.skip(str(error))
    family, model = both.family, both.model
    prompts = [[T(5), I(), T(4)], [T(2), I(), T(11)]]
    inputs = [family.inputs(model, prompts, only=i) for i in range(2)]
    both.change([], {0: both.prefilled(0, inputs[0], chosen)})
    both.step(4)
    both.change([], {1: both.prefilled(1, inputs[1], chosen)})
    both.step(9)
    for i in range(2):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], chosen, len(got)))


def test_a_newcomer_takes_the_place_of_a_leaver() -> None:
    both = company("llava")
    family, model, policy = both.family, both.model, POLICIES["st3"]
    rows = [[T(5), I(), T(4)], [T(2), I(), T(6)], [T(3), I(), T(2)]]
    inputs = [family.inputs(model, rows, only=i) for i in range(3)]
    both.change([], {i: both.prefilled(i, inputs[i], policy) for i in range(2)})
    both.step(3)
    buffer = both.batch.layers[0].filled.keys
    both.change([0], {2: both.prefilled(2, inputs[2], policy)})
    assert both.batch.layers[0].filled.keys is buffer  # the other row was not copied
    both.step(4)
    for i in range(3):
        got = torch.stack(both.logits[i])
        assert_same(got, both.alone(inputs[i], policy, len(got)))


def test_buffers_grow_and_give_back() -> None:
    """Past the headroom, and down to nothing when the last row leaves."""
    both = company("llava")
    policy = POLICIES["st3"]
    inputs = both.family.inputs(both.model, [[T(5), I(), T(4)]])
    both.change([], {0: both.prefilled(0, inputs, policy)})
    both.step(45)
    got = torch.stack(both.logits[0])
    assert_same(got, both.alone(inputs, policy, len(got)))
    assert both.batch.allocated_bytes > 0
    both.change([0], {})
    assert both.batch.allocated_bytes == 0


@pytest.mark.parametrize("policy", ["st3", "none", "st3_early", "fastv"])
def test_a_batch_never_holds_more_than_was_reserved(policy: str) -> None:
    both = company("llava")
    family, model = both.family, both.model
    rows = [[T(5), I(), T(4)], [T(2), I(), T(3), I(), T(6)], [T(7)]]
    inputs = [family.inputs(model, rows, only=i) for i in range(3)]
    schedule = POLICIES[policy].schedule(8)
    budget = Budget(1 << 40, entry_bytes(model, 8))
    tokens, needs, new = 40, [], {}
    for i in range(3):
        new[i] = both.prefilled(i, inputs[i], POLICIES[policy])
        counts = visible_counts(schedule, (new[i].visual,) if new[i].visual else ())
        text = new[i].sequence.prompt - new[i].visual
        needs.append(columns_at_peak(counts, text, tokens))
    both.change([], {0: new[0]})
    for step in range(tokens - 1):
        if step == 7:
            both.change([], {1: new[1], 2: new[2]})
        both.step()
        held = budget.bytes(needs[: len(both.names)])
        assert 0 < both.batch.allocated_bytes <= held
    # And it is no idle promise: at its fullest the batch holds most of it.
    assert both.batch.allocated_bytes > 0.5 * held


def test_visible_counts_are_the_schedules() -> None:
    schedule = POLICIES["st3"].schedule(8)
    counts = visible_counts(schedule, (16, 40))
    for step in (0, 1, 5, 11, 12, 13, 500):
        wanted = tuple(sum(schedule.visible(la, n, step) for n in (16, 40)) for la in range(8))
        assert counts.at(step) == wanted
    for most in (0, 3, 30, 400):
        wanted = tuple(max(counts.at(s)[la] + s for s in range(most + 1)) for la in range(8))
        assert counts.peaks(most) == wanted


def test_lanes_hold_rows_of_like_shapes() -> None:
    budget = Budget(1000, (1, 1))
    small, large = (10, 10), (100, 100)
    assert budget.place([], small, 9) == 0
    assert budget.place([[small]], small, 9) == 0
    assert budget.place([[large]], small, 9) == 1  # padded, it would cost ten times as much
    assert budget.place([[large], [small]], small, 9) == 1
    assert budget.place([[large] * 5], small, 9) is None  # full
    assert budget.place([[large] * 4], large, 9) == 0
    assert budget.place([[small]], small, 1) is None
