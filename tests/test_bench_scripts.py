"""The benchmark finds the largest batch, and runs as commands and scripts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import st3
from st3.cost import TextDims, kv_bytes
from st3.methods import DEFAULT_POLICY
from st3.tools.bench import (
    GROUPED,
    SHAPES,
    Deadline,
    Subject,
    Workload,
    capacity,
    compare,
    models,
    prompts,
    untouched,
)
from st3.tools.bench.bars import Bar
from st3.tools.bench.bars import as_markdown as bars_table
from st3.tools.bench.compiled import compiled_decode
from st3.tools.bench.measure import Generation
from tests.benching import small_bandwidth

# -- capacity -----------------------------------------------------------------------------------


@given(st.integers(0, 700), st.integers(1, 900), st.integers(1, 600))
def test_the_largest_batch_is_found_from_any_guess(truth: int, guess: int, limit: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        assert 1 <= batch <= limit
        tried.append(batch)
        return batch <= truth

    found = capacity.largest_batch(fits, guess, limit)
    best = min(truth, limit)
    assert found <= best
    assert best - found <= max(0, 0.03 * found)
    assert len(tried) == len(set(tried)) <= 16


def test_a_good_guess_needs_few_probes() -> None:
    tried: list[int] = []
    found = capacity.largest_batch(lambda b: tried.append(b) or b <= 310, 300)  # type: ignore[func-returns-value]
    assert 300 <= found <= 310
    assert len(tried) <= 5
    assert capacity.largest_batch(lambda b: b <= 310, 300, deadline=Deadline(0)) == 300


def test_trimmed_rows_are_predicted_to_be_smaller(subject: Subject) -> None:
    work = Workload(visual=600, text=8, new_tokens=16)
    sizes = [capacity.row_bytes(subject, work, m) for m in compare(["balanced"], peers=False)]
    dims = TextDims.from_config(subject.model.config)
    assert sizes[0] > kv_bytes(dims, 8, 600, None, 15, "float32")
    assert sizes[2] < sizes[0]


@pytest.mark.slow
def test_batches_that_do_not_fit_are_backed_off(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capacity.generation

    def short_of_memory(model: Any, made: prompts.Prompt, tokens: int) -> Generation:
        if made.batch > 5:
            raise torch.OutOfMemoryError("no")
        return real(model, made, tokens)

    monkeypatch.setattr(capacity, "generation", short_of_memory)
    work = Workload(visual=16, text=8, new_tokens=3, repeats=2)
    (row,) = capacity.measure_capacity(subject, work, [untouched()], memory=1 << 40, limit=9)
    assert (row.largest, len(row.generations)) == (5, 2)
    total = statistics.median(g.total for g in row.generations)
    assert row.tokens_per_s == pytest.approx(5 * 3 / total)
    assert row.tpot is not None
    monkeypatch.setattr(capacity, "largest_batch", lambda *_, **__: 0)
    with pytest.raises(ValueError, match="not one row fits"):
        capacity.measure_capacity(subject, work, [untouched()], memory=1, limit=9)


@pytest.mark.slow
def test_compiled_decode_is_measured_for_both(subject: Subject) -> None:
    work = Workload(visual=24, text=8, new_tokens=4, repeats=1)
    policies = [st3.NoTrim(), st3.ST3()]
    none, trimmed = compiled_decode(subject, work, policies, {"backend": "eager"})
    assert (none.label, trimmed.label) == ("none", "st3")
    assert trimmed.bytes < none.bytes
    assert none.over_bound(bandwidth=none.bytes / none.tpot) == pytest.approx(1)


def test_goals_are_judged_in_their_direction() -> None:
    goals = [
        Bar("fast", 2.0, 1.5),
        Bar("small", 0.4, 0.3, at_most=True),
        Bar("never run", None, 1.0),
    ]
    assert [goal.met for goal in goals] == [True, False, None]
    page = bars_table(goals)
    assert "| small | 0.4 | at most 0.3 | no |" in page
    assert "not measured" in page


# -- commands -----------------------------------------------------------------------------------


def cli(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from st3.tools.cli import app

    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.slow
def test_st3_bench_writes_tables_and_files(tmp_path: Path) -> None:
    with small_bandwidth():
        done = cli(
            "--shape", "tiny", "--policies", "fastv:layer=2,drop=0.75", "--no-peers", "--batch",
            "1,2", "--new-tokens", 3, "--repeats", 1, "--dtype", "float32", "--out", tmp_path,
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "fastv:drop=0.75" in done.stdout
    assert "load average" in " ".join(done.stdout.split())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "tiny-cpu-float32-tiny-b1-v16-n3.png",
        "tiny-cpu-float32-tiny-b2-v16-n3.png",
        "tiny-cpu-float32.json",
        "tiny-cpu-float32.md",
    ]
    data = json.loads((tmp_path / "tiny-cpu-float32.json").read_text())
    assert [w["workload"]["batch"] for w in data["workloads"]] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--shape", "tiny", "--model", "."), ("--model", "--shape")),
        (("--shape", "nope"), ("nope", "llava-1.5-7b")),
        (("--model", "no/such"), ("no/such", "config.json")),
        (("--batch", "1,x"), ("--batch 1,x",)),
        (("--batch", "0"), ("--batch 0",)),
        (("--shape", "tiny", "--policies", "st4"), ("st4",)),
        (("--shape", "tiny", "--policies", ""), ("no policy",)),
        (("--shape", "tiny", "--policies", "fastv:layer=99"), ("layer=99",)),
        (("--shape", "tiny", "--device", "toaster"), ("toaster",)),
        (("--shape", "tiny", "--dtype", "int3"), ("int3",)),
        (("--shape", "tiny", "--new-tokens", "1"), ("at least 2",)),
        (("--shape", "tiny", "--ragged"), ("two rows",)),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


# -- scripts ------------------------------------------------------------------------------------

TINY = ("--shape", "tiny", "--repeats", "1", "--no-plots", "--out")


@pytest.mark.slow
def test_the_cpu_table_is_written_with_its_goals(tmp_path: Path) -> None:
    from benchmarks import cpu

    with small_bandwidth():
        cpu.main(
            [
                *("--quick", "--sections", "decode", "caption", "ragged", "--visual", "12"),
                *("--caption-tokens", "3", "--dtypes", "float32", *TINY, str(tmp_path)),
            ]
        )
    page = (tmp_path / "cpu-quick-decode-caption-ragged.md").read_text()
    assert "## Goals" in page
    assert "| kv_live, mean over untrimmed: balanced:first_drop=0.87," in page
    assert "## Ragged against uniform" in page
    goals = tmp_path / "cpu-quick-decode-caption-ragged-goals.json"
    assert all(goal["measured"] is not None for goal in json.loads(goals.read_text())["goals"])


@pytest.mark.slow
def test_the_cpu_table_has_rows_of_grouped_queries(tmp_path: Path) -> None:
    from benchmarks import cpu

    with small_bandwidth():
        cpu.main(
            [
                *("--quick", "--sections", "grouped", "--grouped-shapes", "tiny", "--visual", "12"),
                *("--dtypes", "float32", *TINY, str(tmp_path)),
            ]
        )
    goals = json.loads((tmp_path / "cpu-quick-grouped-goals.json").read_text())["goals"]
    name = f"decode step / untouched: {DEFAULT_POLICY}, tiny"
    steps = [(g["goal"], g["at_most"]) for g in goals if g["name"].startswith(name)]
    assert steps == [(1.0, True)]
    assert all(goal["measured"] is not None for goal in goals)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_shapes_share_keys_among_query_heads(name: str) -> None:
    config = SHAPES[name].config
    text = config.text_config
    assert text.num_attention_heads % text.num_key_value_heads == 0
    assert text.num_attention_heads >= 4 * text.num_key_value_heads
    assert 200e6 < models.count_parameters(SHAPES[name]) < 320e6


@pytest.mark.slow
def test_two_checkouts_are_compared_in_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here this one with itself."""
    from benchmarks import old_new

    old_new.main(
        [
            *("--old", str(old_new.ROOT), "--shapes", "tiny", "--dtypes", "float32", "--lengths"),
            *("48", "--batches", "2", "--rounds", "2", "--steps", "2", "--clock", "cpu", "--out"),
            str(tmp_path / "rows.json"),
        ]
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"].split(":")[0] for row in rows] == ["prefill", "decode step, batch 2"] * 3
    assert all(row["same"] and row["low"] <= row["high"] and row["turns"] == 2 for row in rows)
    assert "| old / new |" in capsys.readouterr().out


def test_what_a_checkout_cannot_do_is_one_line(tmp_path: Path) -> None:
    from benchmarks import old_new

    with pytest.raises(SystemExit, match=r"no st3 in .*: give the folder of a checkout"):
        old_new.main(["--old", str(tmp_path)])


def test_the_ratio_is_of_medians_and_the_spread_of_turns() -> None:
    from benchmarks import old_new

    found = old_new.compare([[2.0, 2.0], [4.0], [6.0]], [[1.0], [4.0], [2.0, 2.0]])
    assert (found["old_s"], found["new_s"], found["ratio"]) == (3.0, 2.0, 1.5)
    assert (found["low"], found["high"]) == (1.0, 3.0)


def test_pairs_of_processes_are_one_row_that_says_how_they_differ() -> None:
    from benchmarks import old_new

    first = [("step", True, [[2.0], [2.0]], [[1.0], [1.0]])]
    second = [("step", False, [[3.0], [3.0]], [[3.0], [3.0]])]
    (row,) = old_new.merge([first, second])
    assert row["processes"] == [2.0, 1.0]
    assert (row["ratio"], row["turns"], row["same"]) == (2.5 / 2.0, 4, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "kind", "content"),
    [
        (1, "latency", "| fastv |"),
        (5, "lengths", "lengths not seen before, batch 1, 16 visual tokens"),
        (9, "profile", "one prefill, by the profiler, 16 visual tokens"),
        (13, "throughput", "largest batch, 16 visual tokens"),
    ],
)
def test_gpu_parts_run_on_a_cpu(part: int, kind: str, content: str, tmp_path: Path) -> None:
    from benchmarks import gpu

    with small_bandwidth():
        gpu.main(
            [
                *("--part", str(part), "--device", "cpu", "--batch", "1", "--new-tokens", "3"),
                *("--visual", "16", "--prompts", "1", "--layer-rounds", "1"),
                *("--limit", "2", *TINY, str(tmp_path)),
            ]
        )
    assert content in (tmp_path / f"gpu-tiny-{kind}.md").read_text()
    assert json.loads((tmp_path / f"gpu-tiny-{kind}.json").read_text())["conditions"]


def test_gpu_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import gpu

    gpu.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.PARTS) == 20
    assert lines[0].split() == ["1", "latency", "llava-1.5-7b"]


def test_a_part_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import gpu

    with pytest.raises(SystemExit) as stop:
        gpu.main(["--part", "1", "--device", "toaster"])
    assert stop.value.code == 2
    assert "toaster" in capsys.readouterr().err
