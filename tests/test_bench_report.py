"""A whole workload of the benchmark, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import st3
from st3.tools.bench import (
    Subject,
    Workload,
    attached,
    compare,
    report,
    run,
    steps_of,
    untouched,
)
from st3.tools.bench.measure import Generation
from st3.tools.bench.ragged import RaggedRow, against_uniform
from tests.benching import CPU, logits, prompt, small_bandwidth
from tests.zoo import build as build_family

# -- a whole workload -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(subject: Subject) -> Any:
    with small_bandwidth():
        work = Workload(batch=2, visual=24, text=8, new_tokens=4, repeats=2)
        steps: list[str] = []
        methods = [*compare(["balanced"]), attached()]
        made = run(subject, work, methods, steps.append)
        assert len(steps) == steps_of(work, methods)
        return made


def test_every_method_has_every_sample(result: Any) -> None:
    assert [row.label for row in result.rows] == [
        *(m.label for m in compare(["balanced"])),
        attached().label,
    ]
    for row in result.rows:
        assert len(row.prefill) == len(row.generations) == len(row.tpot) == 2
        assert all(len(g.steps) == 3 for g in row.generations)
        trims = ("balanced", "random:like=(balanced)", "fastv", "vtw")
        assert (row.overhead is not None) == (row.label in trims)


def test_summaries_follow_from_the_samples(result: Any) -> None:
    base, trimmed = result.rows[0], result.rows[2]
    figures = report.summary(result, trimmed)
    tower_time = statistics.median(result.tower)
    ttft = tower_time + statistics.median(trimmed.first)
    assert figures["ttft_s"] == pytest.approx(ttft)
    pairs = [a / b for a, b in zip(base.prefill, trimmed.prefill, strict=True)]
    gain = figures["speed_up"]["prefill"]["paired"]
    assert gain == pytest.approx(statistics.median(pairs))
    assert figures["prefill_speed_up_over_flops_ratio"] == pytest.approx(gain / trimmed.flops_ratio)
    total = tower_time + statistics.median(g.total for g in trimmed.generations)
    assert figures["tokens_per_s"] == pytest.approx(2 * 4 / total)
    live = sum(trimmed.footprint.kv_live) / sum(base.footprint.kv_live)
    assert figures["kv_live_ratio"] == pytest.approx(live)
    assert live < 1
    assert report.summary(result, base)["kv_live_ratio"] == 1


def test_what_trimming_gains_is_told_from_what_the_cache_gains(result: Any) -> None:
    base, cache, trimmed = result.rows[:3]
    assert result.own_cache is cache
    alone = report.summary(result, trimmed)["by_trimming"]["total"]["paired"]
    tower = statistics.median(result.tower)
    pairs = [
        (tower + a.total) / (tower + b.total)
        for a, b in zip(cache.generations, trimmed.generations, strict=True)
    ]
    assert alone == pytest.approx(statistics.median(pairs))
    for other in (base, cache, result.rows[-1]):  # nothing is trimmed there
        assert set(report.summary(result, other)["by_trimming"].values()) == {None}


def test_flops_ratios_are_the_reports(subject: Subject, result: Any) -> None:
    made = prompt(batch=2)
    for row, method in zip(result.rows, compare(["balanced"]), strict=False):
        with method.attach(subject.model, made) as trimmer:
            logits(subject.model, made)
        if isinstance(trimmer, st3.Trimmer):
            assert row.flops_ratio == pytest.approx(1 / trimmer.report.prefill_flops_ratio)


def test_results_become_json_and_markdown(result: Any) -> None:
    where = report_conditions()
    data = json.loads(json.dumps(report.to_dict([result], where)))
    assert data["workloads"][0]["rows"][2]["summary"]["flops_ratio"] > 1
    assert len(data["workloads"][0]["rows"][2]["generations"][0]["steps"]) == 3
    page = report.as_markdown([result], where, "a title")
    for row in result.rows:
        assert page.count(f"| {row.label} |") == (2 if row.policy == "none" else 3)
    for column in ("prefill, ms", "TTFT, ms", "TPOT, ms", "tokens/s", "KV allocated", "/ FLOPs"):
        assert column in page
    assert torch.__version__ in page


def report_conditions() -> dict[str, Any]:
    from st3.tools.common.conditions import conditions

    return conditions(CPU, torch.float32)


def test_pictures_are_drawn_with_one_look_for_each_method(result: Any, tmp_path: Path) -> None:
    from PIL import Image

    from st3.tools.bench.plot import draw
    from st3.tools.common.palette import looks

    target = tmp_path / "bench.png"
    draw(result, target, "somewhere")
    assert Image.open(target).size[0] > 1000
    labels = [row.label for row in result.rows]
    varied = "balanced:stride=2"
    chosen = looks([*labels, varied, "divprune"])
    assert len(set(chosen.values())) == len(chosen)
    assert looks(["balanced"])["balanced"] == chosen["balanced"] == looks([varied])[varied]


def test_drawing_without_matplotlib_names_the_remedy(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from st3.tools.bench.plot import draw

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"st3\[plot\]"):
        draw(result, tmp_path / "bench.png", "somewhere")


def test_prefill_alone_and_generation_alone(subject: Subject) -> None:
    work = Workload(visual=24, text=8, new_tokens=0, repeats=1)
    alone = run(subject, work, [untouched()])
    assert len(alone.rows[0].prefill) == 1
    assert not alone.rows[0].generations
    assert "TTFT" not in " ".join(report.cells(alone, report.TIMES)[0])
    work = dataclasses.replace(work, new_tokens=3)
    decode = run(subject, work, [untouched()], bandwidth=1e9, prefills=False)
    assert not decode.rows[0].prefill
    assert decode.bandwidth == 1e9
    assert "prefill, ms" not in report.cells(decode, report.TIMES)[0]


def test_a_ragged_workload_leaves_out_what_needs_equal_rows(subject: Subject) -> None:
    work = Workload(batch=2, visual=24, text=16, new_tokens=0, ragged=True, repeats=1)
    found = run(subject, work, compare(["fastv"]))
    labels = [row.label for row in found.rows]
    assert "fastv" in labels
    assert "fastv (authors' way)" not in labels


def test_policies_that_do_not_fit_are_refused(subject: Subject) -> None:
    work = Workload(visual=24, text=8, new_tokens=0, repeats=1)
    with pytest.raises(ValueError, match="layer=99"):
        run(subject, work, compare(["fastv:layer=99"], peers=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm"])
def test_other_families_are_measured(name: str) -> None:
    _, model = build_family(name)
    model.generation_config = endless()
    work = Workload(batch=2, visual=16, text=8, new_tokens=3, repeats=1)
    methods = [*compare(["fastv:layer=1"], peers=False), attached()]
    found = run(Subject(name, model.eval(), 16), work, methods, bandwidth=1e9)
    assert found.rows[2].label == "fastv:layer=1"
    live = [row.footprint.kv_live[0] for row in found.rows if row.footprint]
    assert live[0] == live[3]
    assert live[0] <= live[1]  # DynamicCache evicts what lies behind a sliding window
    assert live[2] < live[1]


def endless() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=None, pad_token_id=0)


def test_ragged_against_uniform(subject: Subject) -> None:
    work = Workload(batch=2, visual=24, text=16, new_tokens=3, repeats=2)
    (row,) = against_uniform(subject, work, [untouched()])
    assert len(row.ragged) == len(row.uniform) == 2
    made = RaggedRow(
        "x", [Generation(1.0, (), 2.0), Generation(2.0, (), 4.0)], [Generation(3.0, (), 3.0)] * 2
    )
    assert made.slower("first") == (3.0 + 1.5) / 2
    assert made.slower("total") == (1.5 + 0.75) / 2
