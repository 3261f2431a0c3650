"""The engine's invariants, one test each (those of the columns: tests/test_properties.py).

1. Kept indices ascend in each row, rows are left-aligned in prefill and right-aligned in the cache,
   and text is never dropped.
2. `get_seq_length()` is the logical length, in every layer at all times.
3. A row's live cache entries are one run up to the end.
4. Where that run starts is a pure function of the step.
5. The mask is None wherever it can be: tests/test_masks.py.
6. A schedule that drops nothing touches nothing; 7. after exit nothing is left:
   tests/test_trimmer.py.
"""

from __future__ import annotations

import pytest
import torch

import st3
from st3.hf.cache import stores_of
from st3.hf.call import cache_of
from tests.helpers import POLICIES, ST3, Case
from tests.test_cache import Run
from tests.test_modes import ON_EACH
from tests.test_turns import RAGGED, words


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "st3_early", "fastv", "vtw", "none"])
def test_text_is_never_dropped_and_order_is_kept(name: str, policy: str) -> None:
    """1: what enters a layer is what left the layer before, at ascending places, with all text."""
    case = Case.of(name)
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    layers = case.model.get_decoder().layers[: case.layers]
    with st3.trim(case.model, POLICIES[policy]) as trimmer, torch.no_grad():
        hooks = [
            hook
            for layer in layers
            for hook in (
                layer.input_layernorm.register_forward_pre_hook(lambda m, a: entered.append(a[0])),
                layer.register_forward_hook(
                    lambda m, a, out: left.append(out[0] if isinstance(out, tuple) else out)
                ),
            )
        ]
        case.model(**case.batch)
        for hook in hooks:
            hook.remove()
        report = trimmer.report

    def places(layer: int, row: int) -> list[int]:
        """The prompt's columns that enter a layer, ascending."""
        visual = case.visual[row].nonzero().flatten()[report.kept_positions(layer, row)]
        text = (case.valid[row] & ~case.visual[row]).nonzero().flatten()
        return sorted([*visual.tolist(), *text.tolist()])

    deepstack = hasattr(case.model.get_decoder(), "_deepstack_process")
    for row in range(len(case.visual)):
        # Before the first drop a row's columns are the prompt's own; then they begin at 0.
        at = {column: column for column in places(0, row)}
        for layer in range(1, case.layers):
            now = places(layer, row)
            dropped = entered[layer].shape[1] != entered[layer - 1].shape[1]
            new = {column: i if dropped or at[column] != column else column
                   for i, column in enumerate(now)}  # fmt: skip
            assert set(now) <= set(at)
            if not deepstack:  # which adds image features between two layers
                before = left[layer - 1][row, [at[column] for column in now]]
                assert torch.equal(entered[layer][row, [new[column] for column in now]], before)
            at = new


@ON_EACH
def test_cache_lengths_are_logical(name: str) -> None:
    """2, also while an answer is generated, in all layers."""
    case = Case.of(name)
    lengths: list[set[int]] = []

    def note(module: object, args: object, output: object) -> None:
        layers = cache_of(output).layers  # type: ignore[attr-defined]
        lengths.append({layer.get_seq_length() for layer in layers})

    hook = case.model.register_forward_hook(note)
    case.generate(ST3, 6)
    hook.remove()
    assert lengths == [{case.width + step} for step in range(6)]


@pytest.mark.parametrize("policy", ["st3", "st3_early", "anneal_only"])
def test_rows_are_one_run_whose_start_is_a_function_of_the_step(policy: str) -> None:
    """3 and 4: start = padding + kept - visible(step), whatever was asked before."""
    run = Run(Case.of("llava", RAGGED), POLICIES[policy])
    schedule = run.case.schedule(run.policy)
    for step in range(1, 5):
        run.feed(words(2, 1, step)["input_ids"])
    for index, store in stores_of(run.cache).items():
        text = torch.tensor([9, 12])
        kept = schedule.kept(index, 16)
        width = int(text.max()) + kept
        for step in (3, 1, 9, 4, 0, 200, 4):
            shown = schedule.visible(index, 16, step)
            wanted = [width - int(n) - kept + kept - shown for n in text]
            assert list(store.row_starts(step)) == wanted
        assert store.end == width + 4
        shown = schedule.visible(index, 16, 4)
        assert store.visible_tokens == int(text.sum()) + 2 * (shown + 4)


def test_a_policy_sees_the_original_counts_alone() -> None:
    """The counts of a deep layer do not depend on the rounding of earlier ones."""
    case = Case.of("llava", RAGGED)
    deep = st3.ST3(first_layer=1, first_drop=0.33, final_keep=0.2, stride=1)
    once = st3.FastV(layer=7, drop=0.8)
    schedule = case.schedule(deep)
    _, report = case.prefill(deep)
    assert [row[7] for row in report.kept] == [schedule.kept(7, 16)] * 2
    assert case.schedule(once).kept(7, 16) == round(16 * 0.2)
