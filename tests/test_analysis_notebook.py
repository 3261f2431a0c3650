"""The notebook runs from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "seeing.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_was_saved_without_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 8
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        assert cell["outputs"] == []
        code = "".join(cell["source"])
        exec(compile(code, cell["id"], "exec", dont_inherit=True), namespace)
    printed = capsys.readouterr().out
    assert "untrimmed:" in printed
    assert namespace["suggestion"].policy + ":" in printed
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert (tmp_path / "annealing.gif").exists()
