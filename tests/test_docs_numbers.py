"""Measured figures in the docs are those of the files that they name."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUMBERS = runpy.run_path(str(ROOT / "docs" / "make_numbers.py"))
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", NUMBERS["PAGES"], ids=lambda path: path.name)
def test_tables_are_made_of_the_results(page: Path) -> None:
    """After a new measurement: python docs/make_numbers.py"""
    text = page.read_text(encoding="utf-8")
    assert NUMBERS["BLOCK"].search(text)
    assert NUMBERS["render"](text) == text


def test_files_and_commands_that_pages_name_exist() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        text = page.read_text(encoding="utf-8")
        for script in re.findall(r"`(?:python )?(?:-m )?(benchmarks[\w/.-]+)", text):
            if script.startswith("benchmarks/results/vllm"):
                continue  # made by `make bench-vllm`, where vLLM is installed
            path = script if script.endswith((".py", ".md", ".json")) else script.replace(".", "/")
            found = [ROOT / path, ROOT / f"{path}.py"]
            assert any(one.exists() for one in found), f"{page.name}: {script}"
    for name in re.findall(r"`([\w-]+\.(?:md|json))`", BENCHMARKS):
        assert (RESULTS / name).is_file(), name


def goals(name: str) -> dict[str, Any]:
    data = json.loads((RESULTS / f"{name}-goals.json").read_text(encoding="utf-8"))
    return {goal["name"]: goal for goal in data["goals"]}


def row(start: str) -> list[str]:
    """The cells of the one line of docs/benchmarks.md that begins so, behind the first."""
    (line,) = [x for x in BENCHMARKS.splitlines() if x.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("start", "goal"),
    [
        ("attached, drops nothing", "attached, drops nothing: change of the prefill, bfloat16"),
        (
            "selection, `balanced`, 576",
            "selection, share of the prefill: balanced, 576 visual tokens, bfloat16",
        ),
        (
            "selection, `balanced`, 2,880",
            "selection, share of the prefill: balanced, 2880 visual tokens, bfloat16",
        ),
        (
            "selection, `fastv`, 576",
            "selection, share of the prefill: fastv, 576 visual tokens, bfloat16",
        ),
    ],
)
def test_shares_that_st3_costs(start: str, goal: str) -> None:
    held = goals("cpu-quick")[goal]
    measured, asked, met = row(start)
    digits = len(measured.split(".")[1].split()[0])
    assert measured == f"{100 * held['measured']:.{digits}f} %"
    assert float(asked.split()[0]) == 100 * held["goal"]
    assert met == ("yes" if held["met"] else "no")


def test_ragged_batches() -> None:
    name = "ragged / uniform, batch 2, 576 visual and 64 text tokens, 8 new tokens: balanced"
    held = goals("cpu-quick")[name]
    assert row("ragged batch") == [f"{held['measured']:.2f} x", f"{held['goal']:g} x", "yes"]


@pytest.mark.parametrize(("start", "key"), [("prefill |", "prefill"), ("answer of 32", "total")])
def test_kvpress(start: str, key: str) -> None:
    section = BENCHMARKS[BENCHMARKS.index("[kvpress]") :]
    (line,) = [x for x in section.splitlines() if x.startswith(f"| {start}")]
    shown = [cell.strip() for cell in line.strip("|").split("|")][1:]
    for cell, work in zip(shown, NUMBERS["held"]("kvpress-cpu-308m-cpu"), strict=True):
        ratios = [
            found["speed_up"][key]["paired"]
            for label, found in work["by"].items()
            if label.startswith("kvpress")
        ]
        assert cell == f"{min(ratios):.2f} to {max(ratios):.2f} x"


def test_what_is_possible() -> None:
    found = [
        NUMBERS["trimmed"](work["by"], NUMBERS["SETTING"])["possible"]
        for work in NUMBERS["held"]("front-possible")
    ]
    gains, reached = ([one[key]["median"] for one in found] for key in ("gain", "reached"))
    assert {round(one, 1) for one in gains} == {2.6, 2.7}  # README
    assert {round(one, 2) for one in reached} == {0.97}
    assert max(gains) / min(gains) - 1 < 0.012  # docs/benchmarks.md
