"""The figures in README.md are those of the files that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from st3.methods import DEFAULT_POLICY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cells(text: str, name: str) -> list[list[str]]:
    """The rows of all tables of `text` whose first cell is `name`, without that cell."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row[1:] for row in rows if row[0] == name]


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
        cells(README, f"`{DEFAULT_POLICY}`, the default"),
    )
    assert own[0] in line
    assert untrimmed[0] in line
    (line,) = [line for line in README.splitlines() if line.startswith("| **Gain**")]
    first = [
        float(row.split("|")[4].split()[0])
        for row in README.splitlines()
        if row.startswith("|") and "visual tokens, batch" in row
    ]
    assert f"{min(first):.1f} to {max(first):.1f} times" in line
