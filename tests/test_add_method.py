"""A method with a score of its own is two new files under src: those of docs/policies.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
USE = """
import st3
from st3.methods.scores import SCORES
assert st3.parse("alike:keep=0.3") == st3.Alike(keep=0.3)
assert st3.parse("alike").scorer() == SCORES["likeness"]
assert st3.parse("st3:score=likeness").scorer() == SCORES["likeness"]
assert "alike" in st3.available()
"""


def files() -> dict[str, str]:
    """The two files by their paths below src/st3."""
    section = PAGE[PAGE.index("## Add a method") :]
    paths = re.findall(r"`src/st3/(methods/\w+/\w+\.py)`:", section)
    return dict(zip(paths, (block.code for block in blocks(section)), strict=False))


def test_two_files_are_enough(tmp_path: Path) -> None:
    """In a copy of the package, of which nothing else is changed."""
    package = tmp_path / "st3"
    for source in (ROOT / "src" / "st3").rglob("*.py"):
        target = package / source.relative_to(ROOT / "src" / "st3")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    added = files()
    assert len(added) == 2
    for path, code in added.items():
        (package / path).write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, check=True)
