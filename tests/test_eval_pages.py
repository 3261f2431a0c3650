"""The ablations and the pages that are written from results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation_page, ablations, quality
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
        "conditions": conditions(torch.device("cpu"), torch.float32),
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
    written = ablation_page.write_page(results)
    assert all(path.stat().st_size > 500 for path in written)
    page = (tmp_path / "page.md").read_text()
    assert "| max | 35.0% | 35.0% | 70.0 [+15.0, +25.0] |" in page
    said = "**max** against mean: better by answers right, objects named; worse by KL"
    assert said in page  # more of KL is worse
    assert "**visual** against mean: no difference shown." in page
    assert "answers right 90.0 %" in page


def test_the_bars(tmp_path: Path) -> None:
    rows = [row("none", 1, 0.9), row("balanced:x=1", 0.35, 0.89), row("fastv", 0.35, 0.895),
            row("vtw", 0.5, 0.9)]  # fmt: skip
    text = quality.bars({"kinds": kinds(*rows)})
    assert "98.9% | 98%: met | `fastv` 89.5% |" in text  # vtw keeps more tokens: no comparison
    rows[1]["values"]["recall"][0] = 0.5
    assert "55.6% | 98%: missed" in quality.bars({"kinds": kinds(*rows)})
