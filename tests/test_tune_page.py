"""The page of `st3 tune`, in a real headless browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from st3.tools.see.pages import render
from tests.browser import PROGRAM, Browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        PROGRAM is None, reason="no browser: apt-get install --no-install-recommends chromium"
    ),
]


def finalist(name: str, kept: float, cost: float, verdict: str, confirmed: bool) -> dict[str, Any]:
    seen = {"kept": kept, "kl": 0.01, "items": 20}
    return {
        "policy": f"{name}:keep=0.5", "name": f"{name} at 50%", "verdict": verdict,
        "search": seen, "confirm": seen if confirmed else None,
        "at_least": kept - 0.05 if confirmed else None, "certainty": 0.95, "mean_share": 0.5,
        "cost": {"first": 0.1, "total": 0.5, "first_ratio": cost, "total_ratio": cost,
                 "kv": 1000, "kv_allocated": 1200, "kv_ratio": cost},
    }  # fmt: skip


def page(pick: bool) -> dict[str, Any]:
    finalists = [
        finalist("grid", 0.99, 0.5, "the pick" if pick else "failed on the other half", True),
        finalist("balanced", 1.0, 0.6, "costs more than the pick", True),
        finalist("scope", 0.98, 0.45, "keeps 97.0% on the searching half", False),
    ]
    trial = {
        "policy": "fastv:drop=0.9", "name": "fastv at 15%", "counted_cost": 0.2, "mean_share": 0.15,
        "seen": {"kept": 0.93, "kl": 0.9, "items": 4}, "rejected": "98% is out of reach",
    }  # fmt: skip
    return {
        "policy": "grid:keep=0.5" if pick else "none",
        "outcome": "pick" if pick else "untrimmed",
        "summary": "grid keeps <b>most</b>.",
        "goal": {"kept": 0.98, "for": "end-to-end", "sure": False},
        "evidence": {
            "counted": "right answers", "held_against": "labels", "certain": False,
            "items": {"search": 20, "confirm": 20}, "finalists": finalists, "candidates": [trial],
            "narrowed": {"fastv": "not tried below 50%: 9 of 9 there"},
            "refused": {"visionzip": "no class token"}, "notes": [],
        },
        "conditions": {"model": "st3-tiny", "data": "scenes", "seconds": 12.0, "command": "st3"},
        "axis": "time of the whole answer, of untrimmed", "cost_of": "total_ratio",
        "colors": {"grid:keep=0.5": "#999933", "balanced:keep=0.5": "#4477aa",
                   "scope:keep=0.5": "#01665e"},
        "table_notes": "kept: ...", "conditions_in_words": "a machine",
    }  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("pick", [True, False])
@pytest.mark.parametrize("wide", [390, 1280])
def test_it_shows_the_pick_and_what_was_rejected(
    browser: Browser, tmp_path: Path, wide: int, pick: bool
) -> None:
    path = tmp_path / "policy.html"
    path.write_text(render("tune", "A policy", page(pick)))
    for dark in (False, True):
        browser.open(path, dark, wide)
        text = browser.run("document.body.innerText")
        assert ("Use grid at 50%" if pick else "Stay untrimmed") in text
        assert "grid keeps <b>most</b>." in text
        assert browser.run("document.querySelectorAll('#plot .dot').length") == 2
        assert browser.run("document.querySelectorAll('#plot .hollow').length") == 1
        assert browser.run("document.querySelectorAll('#finalists tbody tr').length") == 3
        assert browser.run(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        assert "fastv (1)" in text
        browser.click("#rejected summary")
        assert "out of reach" in browser.run("document.body.innerText")
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
