"""What a trimmed prefill could gain: the bare model on the columns of the schedule, in turn with
the others. Nothing here depends on how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import st3
from st3.models import family_of
from st3.tools.bench import (
    Subject,
    Workload,
    compare,
    prompts,
    report,
    run,
    steps_of,
    untouched,
)
from st3.tools.bench.measure import forward
from st3.tools.bench.possible import Middle, Pass, Possible, narrowed, possible
from tests.benching import prompt
from tests.zoo import build as build_family


def widths(model: Any, made: prompts.Prompt) -> list[int]:
    """Columns that each decoder layer is called with."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden.shape[1])

    layers = family_of(model).parts(model).layers
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        forward(model, made)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
@pytest.mark.parametrize("batch", [1, 2])
def test_bare_layers_see_as_many_columns_as_trimmed_ones(name: str, batch: int) -> None:
    _, model = build_family(name)
    made, policy = prompt(batch), "st3:first_layer=1,stride=1"
    with st3.trim(model, policy, visual_mask=made.visual) as trimmer:
        trimmed = widths(model, made)
    assert len(set(trimmed)) > 1
    method = compare([policy], peers=False)[2]
    found = possible(model, made, method, rounds=1)
    assert list(found.columns) == trimmed
    with narrowed(trimmer.parts.layers, found.columns):
        assert widths(model, made) == trimmed
    assert widths(model, made) == [32] * len(trimmed)  # nothing is left behind


def test_bare_layers_on_all_columns_compute_what_the_model_does(subject: Subject) -> None:
    made, layers = prompt(2), family_of(subject.model).parts(subject.model).layers
    with torch.no_grad():
        expected = subject.model(input_ids=made.ids).logits
        with narrowed(layers, [32] * len(layers)):
            assert torch.equal(subject.model(input_ids=made.ids).logits, expected)
        with narrowed(layers, [20] * len(layers)):  # the first 20 columns, and no more
            cut = subject.model(input_ids=made.ids).logits
    torch.testing.assert_close(cut, expected[:, :20], rtol=0, atol=1e-5)


def test_figures_by_hand() -> None:
    """Rounds of a machine that gets slower: ratios within each round do not see that."""
    untouched = tuple(Pass(8.0 * slow, (4.0 * slow, 3.0 * slow)) for slow in (1, 2, 4))
    bare = tuple(Pass(4.0 * slow, (2.0 * slow, 1.0 * slow)) for slow in (1, 2, 4))
    trimmed = (Pass(5.0, (2.0, 1.5)), Pass(10.0, (4.0, 3.0)), Pass(16.0, (8.0, 6.0)))
    found = Possible((32, 20), untouched, bare, trimmed)
    assert found.gain == Middle(2.0, 2.0, 2.0)
    assert found.reached == Middle(0.8, 0.8, 0.9)  # 4/5, 8/10, 16/16
    assert found.outside == pytest.approx((5 - 3.5 - 4 + 3) / 5)
    assert found.by_columns() == [(32, 1, 8.0, 4.0, 4.0), (20, 1, 6.0, 2.0, 3.0)]
    one = Possible((32, 20), untouched[:1], bare[:1], trimmed[:1])
    assert one.gain == Middle(2.0, 2.0, 2.0)


def test_what_cannot_be_compared_is_refused(subject: Subject) -> None:
    method = compare(["balanced"], peers=False)[2]
    with pytest.raises(ValueError, match="equal length"):
        possible(subject.model, prompt(2, ragged=True), method, 1)
    with pytest.raises(ValueError, match="untouched drops nothing"):
        possible(subject.model, prompt(), untouched(), 1)
    with pytest.raises(ValueError, match="layer rounds"):
        Workload(layer_rounds=-1)


def test_a_workload_asks_it_of_the_policies_that_were_asked_for(
    subject: Subject, tmp_path: Path
) -> None:
    work = Workload(visual=24, text=8, new_tokens=0, repeats=1, layer_rounds=2)
    methods = compare(["balanced", "none"])
    steps: list[str] = []
    result = run(subject, work, methods, steps.append)
    assert len(steps) == steps_of(work, methods)
    (row,) = [row for row in result.rows if row.possible is not None]
    assert row.label == "balanced"
    assert row.possible is not None
    assert len(row.possible.bare) == 2
    assert all(0 < sum(one.layers) < one.total for one in row.possible.trimmed)
    figures = report.summary(result, row)["possible"]
    assert figures["rounds"] == 2
    assert figures["reached"]["median"] == row.possible.reached.median
    conditions = {"command": "", "machine": "m", "device": "cpu", "dtype": "float32"}
    data = json.loads(json.dumps(report.to_dict([result], conditions)))
    held = next(r for r in data["workloads"][0]["rows"] if r["label"] == "balanced")
    assert held["possible_s"]["bare"] == [one.total for one in row.possible.bare]
    names, lines = report.cells(result, report.GAINS)
    shown = dict(zip(names, next(x for x in lines if x[0] == "balanced"), strict=True))
    reached = row.possible.reached
    assert shown["of possible"] == (
        f"{reached.median:.3f} ({reached.low:.3f} to {reached.high:.3f})"
    )
    assert "2 of layers alone" in report.footnote(result)


def test_ragged_batches_go_without(subject: Subject) -> None:
    work = Workload(
        batch=2, visual=24, text=16, new_tokens=0, ragged=True, repeats=1, layer_rounds=2
    )
    result = run(subject, work, compare(["balanced"], peers=False))
    assert not any(row.possible for row in result.rows)
