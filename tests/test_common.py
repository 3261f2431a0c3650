"""What the tools share: tables, the look of pictures, the stopwatch, conditions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import st3
from st3.tools.common import clock
from st3.tools.common.conditions import conditions, in_words, versions
from st3.tools.common.style import DARK, LIGHT, canvas
from st3.tools.common.tables import console, markdown


def test_markdown_tables_have_figures_on_the_right() -> None:
    text = markdown(("policy", "share", "note"), [("st3", "35%", "a|b"), ("none", 1, "")], (0, 2))
    assert text.splitlines() == [
        "| policy | share | note |",
        "|---|--:|---|",
        "| st3 | 35% | a\\|b |",
        "| none | 1 |  |",
    ]


def test_console_tables_show_their_cells_as_they_are() -> None:
    shown = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    shown.print(console(("policy", "share"), [("st3:[bold]x", "35%"), ("none", 7)]))
    lines = shown.export_text().splitlines()
    assert lines[0].split() == ["policy", "share"]
    assert lines[1].split() == ["st3:[bold]x", "35%"]
    assert lines[2].endswith("    7  ") or lines[2].rstrip().endswith("7")
    assert lines[1].rstrip().rindex("%") == lines[2].rstrip().rindex("7")


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_pictures_have_the_themes_ground_and_leave_matplotlib_as_it_was(
    theme: Any, tmp_path: Path
) -> None:
    import matplotlib
    from PIL import Image, ImageColor

    before = dict(matplotlib.rcParams)
    with canvas((2, 1), font=8, theme=theme) as figure:
        axis = figure.subplots()
        axis.set_title("a title")
        figure.savefig(tmp_path / "a.png", dpi=50)
    assert dict(matplotlib.rcParams) == before
    corner = Image.open(tmp_path / "a.png").convert("RGB").getpixel((0, 0))
    assert corner == ImageColor.getrgb(theme.paper)
    assert axis.title.get_fontsize() == 10
    assert axis.title.get_color() == theme.ink
    assert not axis.spines["top"].get_visible()


def test_no_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'st3\[plot\]'"), canvas((2, 1)):
        pass


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_accelerators_without_events_are_waited_for_at_each_mark(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queued work is done before the time is taken."""
    time = [0.0]
    waited: list[str] = []

    def wait(device: torch.device) -> None:
        waited.append(device.type)
        time[0] += 5.0

    monkeypatch.setattr(clock.torch.accelerator, "synchronize", wait)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: time[0])
    marks = clock.Marks(torch.device(kind))
    for _ in range(3):
        marks.mark()
    assert marks.seconds() == [5.0, 5.0]
    assert waited == [kind] * 4  # also what was under way before


def test_on_a_cpu_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.torch.accelerator, "synchronize", lambda device: 1 / 0)
    marks = clock.Marks(torch.device("cpu"))
    marks.mark()
    marks.mark()
    assert len(marks.seconds()) == 1


def test_conditions_hold_the_versions_and_the_machine() -> None:
    given = conditions(torch.device("cpu"), torch.bfloat16)
    assert {key: given[key] for key in versions()} == versions()
    assert versions()["st3"] == st3.__version__
    words = in_words(given)
    for part in ("1 CPU thread of ", "bfloat16, sdpa", f"torch {torch.__version__}"):
        assert part in words
