"""The code blocks of README.md and docs/*.md run.

Python blocks of a page share their variables, in order. Bash blocks may hold `st3 ...` commands,
which run in this process. Pages run in a folder with photo.png, first.png and second.png. A block
that cannot run says why in the line before it: <!-- no-test: needs a download -->
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from st3.models import registry as families
from st3.tools.cli import app
from st3.tools.common.bundled import ASSETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if p.is_file()]
FENCE = re.compile(
    r"^(?P<indent>[ \t]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.M | re.S,
)
MARKER = re.compile(r"<!-- no-test: .*\S.* -->\s*\Z")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of the first line of code, from 1
    tested: bool


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        indent = match["indent"]
        code = "".join(
            line.removeprefix(indent) for line in match["code"].splitlines(keepends=True)
        )
        line = text.count("\n", 0, match.start("code")) + 1
        tested = not MARKER.search(text[: match.start()])
        found.append(Block(match["language"], code, line, tested))
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a bash block, each split into words, without comments and empty lines."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> None:
    # Empty lines in front make a traceback name the page's own line.
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, page, "exec", dont_inherit=True), namespace)  # no __future__ of this file


def run_bash(block: Block, page: str) -> None:
    for words in commands(block.code):
        where = f"{page}:{block.line}: {shlex.join(words)}"
        assert words[0] == "st3", f"{where}: only st3 commands run here; mark the block no-test"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{where}: exit code {result.exit_code}\n{result.output}"
        assert result.output.strip(), f"{where}: printed nothing"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a page adds is gone behind it.
    monkeypatch.setattr(families, "_families", dict(families._families))
    samples = sorted((ASSETS / "samples").glob("*.png"))
    for name, sample in zip(["photo.png", "first.png", "second.png"], samples, strict=False):
        shutil.copy(sample, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.tested and block.language == "python":
            run_python(block, page.name, namespace)
        elif block.tested and block.language in ("bash", "sh", "console", "shell"):
            run_bash(block, page.name)


def test_blocks_are_found() -> None:
    page = (
        "```python\nx = 1\n```\n\n"
        "<!-- no-test: needs a GPU -->\n```bash\nmake test\n```\n"
        "* item\n\n  ```bash\n  st3 models  # all\n  st3 generate a.png \\\n    -p 'b c'\n  ```\n"
        "<!-- no-test:  -->\n```python\n1 / 0\n```\n"
    )
    found = blocks(page)
    assert [b.language for b in found] == ["python", "bash", "bash", "python"]
    assert [b.tested for b in found] == [True, False, True, True]  # a marker needs a reason
    assert page.splitlines()[found[1].line - 1] == "make test"
    assert commands(found[2].code) == [["st3", "models"], ["st3", "generate", "a.png", "-p", "b c"]]


def test_a_broken_block_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        run_python(Block("python", "1 / 0\n", 7, True), "page.md", {})
    with pytest.raises(AssertionError, match="exit code 2"):
        run_bash(Block("bash", "st3 generate\n", 3, True), "page.md")
    with pytest.raises(AssertionError, match="only st3 commands"):
        run_bash(Block("bash", "ls\n", 3, True), "page.md")
