"""The ablations and the pages that are written from results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation_page, ablations, quality, quality_page
from st3.tools.common.conditions import conditions

LAYERS = 16  # of st3-tiny


@pytest.mark.parametrize("ablation", ablations.ABLATIONS, ids=lambda a: a.name)
def test_every_ablation_fits_the_bundled_model(ablation: ablations.Ablation) -> None:
    rows = ablations.entries_of(ablation, LAYERS)
    assert len({row.label for row in rows}) == len(rows) >= 3
    for row in rows:
        share = row.policy.schedule(LAYERS).mean_share
        if ablation.budget is not None and row.source != "random choice":
            assert share == pytest.approx(ablation.budget, abs=1e-6)


def row(policy: str, share: float, value: float, change: float = 0.0) -> dict[str, Any]:
    names = ("accuracy", "recall", "first", "middle", "last", "kl")
    figures = {name: [value, value - 0.1, value + 0.1] for name in names}
    changes = {name: [change, change - 0.05, change + 0.05] for name in names}
    return {
        "policy": policy,
        "budget": 0.35,
        "random_beside": None,
        "mean_share": share,
        "kv_mean": share,
        "time": 1.0,
        "values": figures,
        "differences": changes,
    }


def kinds(*rows: dict[str, Any]) -> dict[str, Any]:
    return {kind: {"items": 3, "rows": list(rows)} for kind in ("questions", "descriptions")}


def test_the_ablation_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(ablation_page, "PICTURES", tmp_path / "img")
    results = {
        "conditions": conditions(torch.device("cpu"), torch.float32) | {"commit": "abc1234"},
        "untrimmed": kinds(row("none", 1, 0.9)),
        "ablations": [
            {
                "name": "heads",
                "question": "How",
                "budget": 0.35,
                "labels": ["mean", "max", "visual"],
                "kinds": kinds(
                    row("a", 0.35, 0.5), row("b", 0.35, 0.7, 0.2), row("c", 0.35, 0.51, 0.01)
                ),
            }
        ],
    }
    dirty = {"conditions": conditions(torch.device("cpu"), torch.float32) | {"commit": "a-dirty"}}
    with pytest.raises(ValueError, match="a tree with changes"):
        ablation_page.write_page(results | dirty)
    written = ablation_page.write_page(results)
    assert all(path.stat().st_size > 500 for path in written)
    page = (tmp_path / "page.md").read_text()
    assert "| max | 35.0% | 35.0% | 70.0 [+15.0, +25.0] |" in page
    said = "**max** against mean: better by answers right, objects named; worse by KL"
    assert said in page  # more of KL is worse
    assert "**visual** against mean: no difference shown." in page
    assert "answers right 90.0 %" in page


def named(source: str, budget: float | None, value: float, **more: Any) -> dict[str, Any]:
    own = row(source, budget or 1.0, value) | {"budget": budget, "source": source}
    own |= {"prefill_flops": 0.4, "hard_items": 7, "tasks": {"place": [value, 0, 1]}} | more
    own["values"] = dict(own["values"])
    return own


def results() -> dict[str, Any]:
    rows = [named("none", None, 0.9), named("thirds", 0.35, 0.89), named("grid", 0.35, 0.88),
            named("downsample", 0.35, 0.5), named("fastv", 0.35, 0.895),
            named("random like thirds", 0.35, 0.7, random_beside="thirds"),
            named("thirds", 0.2, 0.85), named("vtw", 0.2, 0.6)]  # fmt: skip
    for number in range(9):
        rows.append(named(f"other{number}", 0.35, 0.1 + number / 100))
    for one in rows[1:]:
        one["values"]["hard"] = [one["values"]["accuracy"][0] / 2, 0.1, 0.9]
    given = conditions(torch.device("cpu"), torch.float32) | {"commit": "abc1234", "items": 6}
    return {"conditions": given, "kinds": kinds(*rows), "notes": ["a note"], "images": 3}


def test_the_quality_page_shows_ten_rows_of_a_table() -> None:
    text = quality_page.page(results(), Path("benchmarks/results/x.json"))
    part = text.partition("## Questions (3) at 35%")[2].partition("## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    for name in ("`none`", "`thirds`", "`grid`", "`downsample`", "random like thirds"):
        assert any(line.startswith(f"| {name} |") for line in rows)
    assert not any("other3" in line for line in rows)  # the worst are in the file alone
    assert "44.5 [10.0, 90.0] of 7" in part
    downsample = next(line for line in rows if "downsample" in line)
    assert "of 7" not in downsample  # none of the hard ones, by choice
    assert "`benchmarks/results/x.md`" in text


def test_the_bars_of_the_default() -> None:
    found = results()["kinds"]
    text = quality_page.bars(found)
    assert "| 35% | answers right | 90.0% | 89.0% | 98.9% | 98%: met | `fastv` 89.5% |" in text
    assert "| 20% | answers right | 90.0% | 85.0% | 94.4% | 95%: missed | none |" in text
    assert "At 35% `fastv` is at or above every other" in quality_page.verdict(found)
    found["descriptions"]["rows"][4]["values"]["recall"][0] = 0.1
    assert "At 35% no policy is" in quality_page.verdict(found)


def test_the_page_builder_refuses_results_that_no_commit_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_page, "PAGE", tmp_path / "page.md")
    file = tmp_path / "results.json"
    for change in ({"commit": "abc1234-dirty"}, {"engine": "another"}, {"st3": "0.0"}):
        found = results()
        found["conditions"] |= change
        file.write_text(json.dumps(found))
        with pytest.raises(ValueError, match="these results are of"):
            quality_page.write_page(file)
    assert not quality_page.PAGE.exists()
    file.write_text(json.dumps(results()))
    assert quality_page.write_page(file).stat().st_size > 1000


def test_what_the_quality_page_asks() -> None:
    data = quality.scenes(2)
    assert {item.half for item in data.items} == {"report"}
    counts = {task: sum(item.task == task for item in data.items) for task in data.tasks}
    assert set(counts.values()) == {2}
