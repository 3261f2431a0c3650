"""Reads what was measured: the files in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from st3.tools.bench.clock import speed_up

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
OWN_CACHE = "untrimmed, st3's cache"
FIELD = {"ttft": "first", "total": "total"}


def held(name: str) -> list[dict[str, Any]]:
    """The workloads of a result, each with its rows' summaries by label."""
    data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    found = []
    for one in data["workloads"]:
        rows = {row["label"]: row for row in one["rows"]}
        if OWN_CACHE in rows and one["rows"][0]["generations"]:
            tower = median(one["tower_s"] or [0.0])
            for row in rows.values():
                row["summary"].setdefault("by_trimming", alone(rows[OWN_CACHE], row, tower))
        found.append({**one, "by": {label: row["summary"] for label, row in rows.items()}})
    return found


def alone(cache: dict[str, Any], row: dict[str, Any], tower: float) -> dict[str, Any]:
    """Speed-ups over the untrimmed model on st3's cache, round by round, for results that are older
    than `st3 bench` itself has had them. Times that begin with the image hold the tower's."""
    found = {}
    for key, extra in (("ttft", tower), ("tpot", 0.0), ("total", tower)):
        times = [
            [extra + (median(one["steps"]) if key == "tpot" else one[FIELD[key]]) for one in runs]
            for runs in (cache["generations"], row["generations"])
        ]
        ratio = speed_up(*times)
        found[key] = None if ratio is None else vars(ratio)
    return found


def trimmed(by: dict[str, Any], policy: str) -> dict[str, Any]:
    """The summary of a policy that was given with a budget, "balanced:budget=35%"."""
    name, budget = policy.split(":budget=")
    share = float(budget.strip("%")) / 100
    return next(
        summary
        for label, summary in by.items()
        if label.split(":")[0] == name and label.endswith(f"budget={share}")
    )


def gain(ratio: dict[str, float]) -> str:
    """A speed-up and the spread of its rounds: "2.48 x (12 %)"."""
    return f"{ratio['paired']:.2f} x ({ratio['spread']:.0%})".replace("%", " %")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
