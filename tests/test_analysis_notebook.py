"""The notebook runs from top to bottom, and what it shows is of the code that it has."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "seeing.ipynb"


def notebook() -> Any:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def code(of: Any) -> list[Any]:
    return [cell for cell in of["cells"] if cell["cell_type"] == "code"]


def test_it_was_saved_with_what_its_code_shows() -> None:
    spec = importlib.util.spec_from_file_location(
        "run_notebook", NOTEBOOK.parent / "run_notebook.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    saved = notebook()
    assert saved["metadata"]["st3_code"] == script.code_hash(saved), (
        "the code has changed: run examples/run_notebook.py"
    )
    outputs = [one for cell in code(saved) for one in cell["outputs"]]
    kinds = [kind for one in outputs for kind in one.get("data", {})]
    assert kinds.count("image/png") >= 6
    assert "text/html" in kinds
    assert not [one for one in outputs if one["output_type"] == "error"]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    for place in ("/home/", "/work/", "/root/", "/tmp/"):
        assert place not in text


@pytest.mark.slow
def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    saved = notebook()
    assert saved["nbformat"] == 4
    cells = code(saved)
    assert len(cells) > 8
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        source = "".join(cell["source"])
        exec(compile(source, cell["id"], "exec", dont_inherit=True), namespace)
    printed = capsys.readouterr().out
    assert "untrimmed:" in printed
    assert f"{namespace['trimmer'].policy}:" in printed
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert (tmp_path / "annealing.gif").exists()
