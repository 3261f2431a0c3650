"""What is published: a small wheel, the bundled model as a package of its own, and a README without
links that only a repository has."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import st3
from st3.tools.common import bundled
from st3.tools.common.load import LoadError, load_model

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3 << 20


def wheel(project: Path, out: Path) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_is_small_and_whole(tmp_path: Path) -> None:
    made = wheel(ROOT, tmp_path)
    assert made.stat().st_size < LIMIT
    names = zipfile.ZipFile(made).namelist()
    assert not [name for name in names if name.endswith(".safetensors")]
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "st3").rglob("*.py")}
    assert source <= set(names)
    for kept in (
        "st3/py.typed",
        "st3/assets/samples/000.png",
        "st3/assets/scenes/scenes.jsonl",
        "st3/tools/see/pages/report.js",
        "st3/tools/serve/page/page.html",
        "st3/tools/serve/page/page.js",
    ):
        assert kept in names
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(made).read(metadata).decode()
    assert not re.findall(r"\]\((?!https?:|#|mailto:)[^)]*\)", text)
    assert not re.findall(r"src(?:set)?=\"(?!https?:)", text)
    assert "with st3.trim(model) as trimmer:" in text  # code is as it was


@pytest.mark.slow
def test_the_models_package_has_the_whole_model(tmp_path: Path) -> None:
    made = zipfile.ZipFile(wheel(ROOT / "packages" / "st3-tiny", tmp_path))
    held = {Path(name).name for name in made.namelist() if name.startswith("st3_tiny/model/")}
    assert held == {path.name for path in st3.bundled_model().iterdir()}


def test_links_of_the_repository_become_words() -> None:
    hatch_build = pytest.importorskip("hatch_build", reason="hatchling builds the wheel")
    text = (
        "See [Cost](docs/cost.md#a), [paper](https://arxiv.org/abs/1) and [below](#there).\n\n"
        "![What it does](docs/img/demo.png)\n\n"
        '<picture>\n<source srcset="docs/img/dark.png">\n<img src="docs/img/a.png">\n</picture>\n\n'
        "Next.\n```python\nx = y[0](z)\n```\n"
    )
    assert hatch_build.for_index(text) == (
        "See Cost, [paper](https://arxiv.org/abs/1) and [below](#there).\n\n"
        "Next.\n```python\nx = y[0](z)\n```\n"
    )


def test_the_model_is_found_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "ASSETS", tmp_path / "none")
    monkeypatch.setattr(bundled, "PACKAGE", "st3_tiny_of_a_test")
    with pytest.raises(FileNotFoundError, match="packages/st3-tiny"):
        bundled.bundled_model()
    with pytest.raises(LoadError, match=r"name another model with --model"):
        load_model(None)
    model = tmp_path / "st3_tiny_of_a_test" / "model"
    model.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="packages/st3-tiny"):  # a folder without a model
        bundled.bundled_model()
    (model / "config.json").write_text("{}")
    assert bundled.bundled_model() == model
