"""Who may import whom, where transformers' names may stand, and how long a file may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "st3"
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
TOP_LEVEL = {
    "__init__.py", "assets", "cost", "engine", "errors.py", "hf", "methods", "models", "py.typed",
    "report", "tools", "trimmer.py", "vllm",
}  # fmt: skip

# What transformers does not promise to keep. Only these folders may name it.
INTERNALS = re.compile(
    "past_key_values|_attn_implementation|get_placeholder_mask|_deepstack_process|CacheLayerMixin"
)
SEAM = ("hf", "models")

CORE_LINES, LINES = 300, 400

# Tools that may be used by other tools, besides `common`, which all of them share.
USES = {
    "cli": {"batch", "bench", "eval", "see", "serve", "tune"},
    "tune": {"eval", "see"},  # measures as `st3 eval` does; its page is one of see's
    "lmms": {"eval"},  # makes lmms-eval's tasks of the sets of `st3 eval`
}


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules that a file imports, at the top or within functions, as tuples of names. Of
    ``from a import b`` both a and a.b, since b may be a module."""
    package = ("st3", *path.parent.parts)
    for node in ast.walk(ast.parse((SOURCE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield tuple(name.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*start, *(node.module or "").split(".")) if node.module else start
            yield module
            for name in node.names:
                yield (*module, name.name)


def room(path: Path) -> str:
    """``methods``, ``engine`` ..., or ``tools/eval``."""
    parts = path.with_suffix("").parts
    return "/".join(parts[:2]) if parts[0] == "tools" and len(parts) > 2 else parts[0]


def of(*rooms: str) -> list[Path]:
    return [path for path in FILES if room(path) in rooms]


CORE = [path for path in FILES if path.parts[0] not in ("tools", "vllm", "__init__.py")]
TOOLS = [path for path in FILES if path.parts[0] == "tools"]


def test_the_files_are_found() -> None:
    assert len(CORE) > 50
    assert len(TOOLS) > 50
    assert ("st3", "tools", "common", "images") in imports(Path("tools/cli/_loading.py"))
    assert ("st3", "cost", "dims") in imports(Path("cost/table.py"))  # a relative one


def test_nothing_else_lies_at_the_top() -> None:
    found = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert found <= TOP_LEVEL, f"put {found - TOP_LEVEL} into a folder"


def against(paths: list[Path], rule: Callable[[tuple[str, ...]], bool]) -> list[str]:
    """The imports that break a rule, with the files that they stand in."""
    return [f"{path}: {'.'.join(m)}" for path in paths for m in imports(path) if not rule(m)]


def from_st3(module: tuple[str, ...], *parts: str) -> bool:
    return module[0] == "st3" and len(module) > 1 and module[1] in parts


def test_methods_know_neither_transformers_nor_the_engine() -> None:
    def allowed(module: tuple[str, ...]) -> bool:
        return module[0] != "transformers" and (
            module[0] != "st3" or len(module) == 1 or from_st3(module, "methods", "errors")
        )

    assert not against(of("methods"), allowed)


def test_the_engine_works_on_tensors_alone() -> None:
    def allowed(module: tuple[str, ...]) -> bool:
        return module[0] != "transformers" and (
            module[0] != "st3"
            or len(module) == 1
            or from_st3(module, "engine", "methods", "errors")
        )

    assert not against(of("engine"), allowed)


def test_the_core_imports_no_tool() -> None:
    assert not against(CORE, lambda module: not from_st3(module, "tools", "vllm"))


def test_models_and_cost_know_nothing_of_the_engine() -> None:
    assert not against(of("models", "cost"), lambda m: not from_st3(m, "engine", "report"))


@pytest.mark.parametrize("tool", sorted({path.parts[1] for path in TOOLS if len(path.parts) > 2}))
def test_tools_share_through_common_alone(tool: str) -> None:
    known = {tool, "common"} | USES.get(tool, set())

    def allowed(module: tuple[str, ...]) -> bool:
        return module[:2] != ("st3", "tools") or len(module) == 2 or module[2] in known

    assert not against(of(f"tools/{tool}"), allowed)


def test_common_needs_no_part_of_the_engine() -> None:
    assert not against(of("tools/common"), lambda m: not from_st3(m, "engine", "hf", "models"))


def test_only_the_seam_names_what_transformers_may_change() -> None:
    found = [
        f"{path}: {name}"
        for path in FILES
        if path.parts[0] not in SEAM
        for name in sorted(set(INTERNALS.findall((SOURCE / path).read_text(encoding="utf-8"))))
    ]
    assert not found, "ask st3.hf or the family for it"


def test_files_are_short() -> None:
    long = []
    for path in FILES:
        limit = LINES if path.parts[0] in ("tools", "vllm") else CORE_LINES
        count = (SOURCE / path).read_text(encoding="utf-8").count("\n")
        if count > limit:
            long.append(f"{path}: {count} lines, {limit} are allowed")
    assert not long, "split them"
