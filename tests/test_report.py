"""The report against counts, costs and memory that are worked out here anew."""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import DynamicCache

import st3
from st3.cost import TextDims, prefill_flops
from st3.hf.cache import stores_of
from st3.hf.call import CACHE, cache_of
from tests.helpers import POLICIES, ST3, Case
from tests.test_cache import Run
from tests.test_modes import ON_EACH, SEVERAL, SOLO
from tests.test_turns import RAGGED, words
from tests.zoo import I, T

TOKEN = 2 * 2 * 8 * 4  # bytes of a KV entry of the tiny models: K and V, 2 heads of 8, fp32


def report_of(case: Case, policy: st3.Policy, tokens: int = 6, **options: Any) -> st3.Report:
    own = {k: options.pop(k) for k in ("per_image", "own_cache") if k in options}
    with st3.trim(case.model, policy, **own) as trimmer:
        case.generate(None, tokens, **options)
    return trimmer.report


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "fastv", "vtw", "none"])
def test_counts_are_the_schedules(name: str, policy: str) -> None:
    case = Case.of(name)
    report = report_of(case, POLICIES[policy])
    schedule = case.schedule(POLICIES[policy])
    n_visual = case.visual.sum(1).tolist()
    assert report.policy == str(POLICIES[policy])
    assert report.schedule == schedule
    assert report.n_visual == n_visual
    assert list(report.n_text) == (case.valid.sum(1) - case.visual.sum(1)).tolist()
    assert report.kept == tuple(
        tuple(schedule.kept(layer, n) for layer in range(8)) for n in n_visual
    )
    total = sum(map(sum, report.kept))
    assert report.mean_share == pytest.approx(total / sum(n_visual) / 8)
    assert report.steps == 5


def test_images_are_told_apart() -> None:
    report = report_of(Case.of("pixtral", SEVERAL), ST3, per_image=True)
    # Row breaks are text between the runs of 4 tokens of an image of 3 rows.
    assert report.visual_per_image == ((4,) * 9, (4,) * 3, (4,) * 3)
    report = report_of(Case.of("llava", SEVERAL), ST3, per_image=True)
    assert report.visual_per_image == ((16, 16, 16), (16,), (16,))
    per_image = Case.of("llava").schedule(ST3).kept(7, 16)
    assert [row[7] for row in report.kept] == [3 * per_image, per_image, per_image]


@ON_EACH
@pytest.mark.parametrize("policy", ["st3", "fastv", "random", "vtw"])
def test_kept_positions_are_the_references(name: str, policy: str) -> None:
    case = Case.of(name)
    report = report_of(case, POLICIES[policy])
    wanted = case.reference_prefill(POLICIES[policy])
    case.check_kept(report, wanted.kept)
    for layer in range(8):
        for row in range(len(case.visual)):
            places = report.kept_positions(layer, row)
            assert places.dtype == torch.int64
            assert places.device.type == "cpu"
            assert (places.diff() > 0).all()
            assert len(places) == report.kept[row][layer]
            assert not len(places) or 0 <= places[0] <= places[-1] < report.n_visual[row]


def test_kept_positions_of_an_untrimmed_run_are_all() -> None:
    report = report_of(Case.of("llava", SOLO), st3.NoTrim())
    assert report.kept_positions(7).tolist() == list(range(16))


@pytest.mark.parametrize(("layer", "row"), [(8, 0), (-1, 0), (0, 1), (0, -1)])
def test_layers_and_rows_that_do_not_exist(layer: int, row: int) -> None:
    report = report_of(Case.of("llava", SOLO), ST3)
    with pytest.raises(ValueError, match=r"does not exist: 0 to \d"):
        report.kept_positions(layer, row)


@ON_EACH
def test_prefill_flops_are_the_cost_models(name: str) -> None:
    case = Case.of(name, SOLO)
    report = report_of(case, ST3)
    dims = TextDims.from_config(case.model.config)
    n_visual = int(case.visual.sum())
    counts = {"n_text": case.width - n_visual, "n_visual": n_visual}
    trimmed = prefill_flops(dims, **counts, schedule=case.schedule(ST3)).total
    untrimmed = prefill_flops(dims, **counts).total
    assert report.prefill_flops == trimmed
    assert report.untrimmed_prefill_flops == untrimmed
    assert report.prefill_flops_ratio == trimmed / untrimmed
    assert 0.3 < trimmed / untrimmed < 0.9


def test_flops_of_a_batch_are_those_of_its_rows() -> None:
    case = Case.of("llava")
    rows = [report_of(Case.of("llava", only=i), ST3) for i in range(2)]
    text = prefill_flops(TextDims.from_config(case.model.config), 7, 0).total
    assert report_of(case, ST3).prefill_flops == sum(r.prefill_flops or 0 for r in rows) + text


# -- KV memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["st3", "st3_early", "fastv", "vtw"])
def test_live_bytes_are_those_that_each_step_sees(policy: str) -> None:
    case = Case.of("llava", RAGGED)
    report = report_of(case, POLICIES[policy], tokens=9)
    schedule = case.schedule(POLICIES[policy])
    text = (case.valid.sum() - case.visual.sum()).item()
    assert [sample.step for sample in report.samples] == list(range(9))
    untrimmed = []
    for step, sample in enumerate(report.samples):
        visual = sum(schedule.visible(layer, 16, step) for layer in range(8) for _ in range(2))
        assert sample.live == TOKEN * (8 * (text + 2 * step) + visual)
        untrimmed.append(TOKEN * 8 * (text + 2 * step + 32))
        assert sample.allocated >= sample.live
    assert report.kv_live_bytes == report.samples[-1].live
    assert report.kv_allocated_bytes == report.samples[-1].allocated
    assert report.kv_untrimmed_bytes == untrimmed[-1]
    live = sum(sample.live for sample in report.samples)
    assert report.kv_mean_ratio == pytest.approx(live / sum(untrimmed))
    allocated = sum(sample.allocated for sample in report.samples)
    assert report.kv_mean_allocated_ratio == pytest.approx(allocated / sum(untrimmed))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_allocated_bytes_are_those_of_the_tensors(name: str) -> None:
    run = Run(Case.of(name, RAGGED))
    for step in range(3):
        run.feed(words(2, 1, step)["input_ids"])
    held = sum(
        buffer.untyped_storage().nbytes()
        for store in stores_of(run.cache).values()
        for buffer in (store.filled.keys, store.filled.values)
    )
    assert run.trimmer.report.kv_allocated_bytes == held


@pytest.mark.parametrize("name", ["llava", "gemma3", "gemma4", "kimi_k25"])
def test_untrimmed_bytes_are_those_of_the_bare_models_cache(name: str) -> None:
    case = Case.of(name, SOLO)
    bare = cache_of(case.generate(None, 5))
    held = sum(t.numel() * 4 for layer in bare.layers for t in (layer.keys, layer.values))
    for policy in (ST3, st3.NoTrim()):
        assert report_of(case, policy, tokens=5).kv_untrimmed_bytes == held


def test_without_a_cache_nothing_is_sampled() -> None:
    case = Case.of("llava", SOLO)
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        case.model(**case.batch, use_cache=False)
    assert trimmer.report.samples == []
    assert trimmer.report.steps == 0


# -- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["st3", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["", "beams", "lookup"]
)
def test_steps_are_the_tokens_behind_the_first(policy: str, options: dict[str, Any]) -> None:
    case = Case.of("llava", [[T(8), I(), T(5)]])
    case.batch["input_ids"][0, -3:] = case.batch["input_ids"][0, :3]
    report = report_of(case, POLICIES[policy], tokens=20, **options)
    # Untrimmed, the candidates of the last check count although they were rejected.
    slack = 3 if policy == "none" and "prompt_lookup_num_tokens" in options else 0
    assert 19 <= report.steps <= 19 + slack


def test_a_report_is_of_the_latest_prompt() -> None:
    case, other = Case.of("llava", SOLO), Case.of("llava", RAGGED)
    with st3.trim(case.model, ST3) as trimmer, torch.no_grad():
        case.generate(None, 6)
        first = trimmer.report
        case.model(**other.batch)
        second = trimmer.report
        assert second is not first
    assert (first.steps, second.steps) == (5, 0)
    assert (len(first.kept), len(second.kept)) == (1, 2)


def test_an_earlier_conversation_does_not_get_into_the_latest_report() -> None:
    run = Run(Case.of("llava", RAGGED))
    with run.trimmer, torch.no_grad():
        run.case.model(**run.case.batch, **{CACHE: DynamicCache()})
    run.feed(words(2, 1, 1)["input_ids"])
    assert run.trimmer.report.steps == 0
    assert len(run.trimmer.report.samples) == 1


def test_a_second_turn_with_an_image_counts_the_first_in_memory() -> None:
    case = Case.of("llava", SOLO)
    run = Run(case)
    run.feed(words(1, 1, 1)["input_ids"])
    new = case.family.inputs(case.model, [[T(2), I(), T(3)]], seed=1)
    run.mask = torch.cat([run.mask, new.pop("attention_mask")], 1)
    run._run(new)
    run.feed(words(1, 1, 2)["input_ids"])
    report, schedule = run.trimmer.report, case.schedule(ST3)
    assert (report.n_past, report.n_visual, report.n_text) == ((26,), [16], (5,))
    assert report.steps == 1
    length = 26 + 21 + 1  # the first prompt and a token, the second prompt, a token
    assert report.kv_untrimmed_bytes == TOKEN * 8 * length
    step = length - case.width
    visual = sum(schedule.visible(layer, 16, step) + schedule.kept(layer, 16) for layer in range(8))
    assert report.kv_live_bytes == TOKEN * (8 * (length - 32) + visual)


def test_padding_of_an_earlier_turn_is_no_past() -> None:
    case = Case.of("llava", [[T(4)], [T(6)]])
    new = case.family.inputs(case.model, [[T(2), I(), T(3)]] * 2, seed=1)
    mask = torch.cat([case.batch["attention_mask"], new["attention_mask"]], 1)
    cache = DynamicCache(config=case.model.config)
    with torch.no_grad(), st3.trim(case.model, ST3) as trimmer:
        case.model(**case.batch, **{CACHE: cache})
        case.model(**{**new, "attention_mask": mask}, **{CACHE: cache})
    lengths = case.batch["attention_mask"].sum(1).tolist()
    assert lengths[0] < lengths[1]
    assert trimmer.report.n_past == tuple(lengths)


# -- for people and programs --------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_it_prints_as_an_aligned_table(policy: str) -> None:
    lines = str(report_of(Case.of("llava"), POLICIES[policy])).splitlines()
    column = lines[0].index(str(POLICIES[policy]))
    for line in lines:
        assert re.fullmatch(r"\S.*\S  +", line[:column])
        assert line[column] != " "
    names = [line[:column].strip() for line in lines]
    assert names == [
        "policy",
        "visual tokens",
        "text tokens",
        "kept per layer",
        "mean share",
        "prefill FLOPs",
        "decode steps",
        "KV live",
        "KV allocated",
        "KV mean",
    ]


def test_the_counts_it_prints() -> None:
    text = str(report_of(Case.of("llava", SOLO), POLICIES["fastv"]))
    assert "2 x 16, 6 x 8" in text
    assert "62.5% of the visual tokens" in text


def test_it_goes_through_json() -> None:
    report = report_of(Case.of("llava"), ST3)
    read = json.loads(json.dumps(report.to_dict()))
    assert read["n_visual"] == [16, 32, 0]
    assert read["kept"] == [list(row) for row in report.kept]
    assert read["steps"] == 5
    assert read["kv_live_bytes"] == report.kv_live_bytes
    assert read["prefill_flops_ratio"] == report.prefill_flops_ratio


def test_a_notebook_shows_a_table_and_a_chart() -> None:
    policy = st3.parse("random:like=(fastv:drop=0.5,layer=2),seed=1")
    report = report_of(Case.of("llava", SOLO), policy)
    shown = report._repr_html_()
    for name, value in [line.split("  ", 1) for line in str(report).splitlines()]:
        assert f">{name}</th>" in shown
        assert f">{value.strip()}</td>" in shown
    assert shown.count("<rect") == shown.count("<title>layer ") == 8
    root = ElementTree.fromstring(f"<div>{shown}</div>")  # well-formed: nothing is left unescaped
    heights = [float(bar.attrib["height"]) for bar in root.iter("rect")]
    assert heights[:2] == [60, 60]
    assert heights[2:] == [30] * 6
    assert "script" not in shown
    line = repr(report)
    assert line.startswith("<Report: random:")
    assert "16 visual tokens" in line
    assert len(line) < 200


def test_it_is_written_as_json() -> None:
    report = report_of(Case.of("llava"), ST3)
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))
    assert report.to_json(indent=1).startswith("{\n")


def test_it_draws_itself() -> None:
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    report = report_of(Case.of("llava"), ST3)
    axes = report.plot()
    drawn = [patch for patch in axes.patches if hasattr(patch, "get_data")]
    assert [patch.get_data().values.tolist() for patch in drawn] == [list(k) for k in report.kept]
    own = pyplot.subplots()[1]
    assert report.plot(own) is own
    pyplot.close("all")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"st3\[plot\]"):
        report_of(Case.of("llava"), ST3).plot()
