"""The figures in README.md are those of the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
SPEED = {  # README's row: file, heading of its tables
    "576 visual tokens, batch 1": (
        "cpu-quick.md",
        "batch 1, 576 visual and 64 text tokens, 32 new",
    ),
    "2,880 visual tokens, batch 1": (
        "cpu-quick.md",
        "batch 1, 2880 visual and 64 text tokens, 32 new",
    ),
    "2,880 visual tokens, batch 8": (
        "cpu-decode-2880.md",
        "batch 8, 2880 visual and 64 text tokens, 32 new",
    ),
}


def cells(text: str, name: str) -> list[list[str]]:
    """The rows of all tables of `text` whose first cell is `name`, without that cell."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row[1:] for row in rows if row[0] == name]


def section(path: Path, heading: str) -> str:
    """What stands below the heading that contains `heading`, up to the next one."""
    text = path.read_text(encoding="utf-8")
    return next(part for part in re.split(r"^## ", text, flags=re.M)[1:] if heading in part[:200])


@pytest.mark.parametrize("row", SPEED)
def test_speed(row: str) -> None:
    name, heading = SPEED[row]
    part = section(RESULTS / name, heading)
    (plain, plain_ratios), (trimmed, ratios) = (
        cells(part, "untrimmed, st3's cache"),
        cells(part, "balanced"),
    )
    alone = [f"{float(plain[i]) / float(trimmed[i]):.2f} x" for i in range(3)]  # TTFT, TPOT, all
    assert cells(README, row)[0] == [trimmed[5].replace("%", " %"), f"{ratios[0]} x", *alone]
    in_all = [f"{float(both[3].split()[0]):.2f} x" for both in (plain_ratios, ratios)]
    assert cells(README, row)[1] == in_all


@pytest.mark.parametrize(
    "shape", ["qwen2.5-vl-7b", "qwen3-vl-8b", "llava-1.5-7b", "internvl3-8b", "gemma-3-4b"]
)
def test_cost(shape: str) -> None:
    (row,) = cells((ROOT / "docs" / "cost.md").read_text(encoding="utf-8"), shape)
    (named,) = [line for line in README.splitlines() if f"(`{shape}`)" in line]
    shown = [cell.strip() for cell in named.strip("|").split("|")][1:]
    assert shown[0].replace(",", "") == row[0].split()[0]
    assert shown[1:] == [row[i].replace("%", " %") for i in (3, 4, 6, 7)]


def test_the_first_screen_says_what_the_table_does() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("| **Cost**")]
    (untrimmed,), (own,) = (
        cells(README, "untrimmed, 100 %"),
        cells(README, "`balanced`, the default"),
    )
    assert own[0] in line
    assert untrimmed[0] in line
