"""Where and how something was measured: goes into every result."""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import st3


def conditions(device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> dict[str, Any]:
    """Machine, versions, command and load, as plain values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "engine": engine(),
        "machine": _machine(device),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "threads": torch.get_num_threads(),
        "load_average": _load(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Of what an answer depends on: results of different ones are not to be mixed."""
    return {
        "st3": st3.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@functools.cache
def engine() -> str:
    """Tells versions of the core apart: a hash of the code that decides what is kept and computed,
    comments and docstrings aside."""
    root = Path(st3.__file__).parent
    digest = hashlib.sha256()
    for folder in CORE:
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):
                    node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
            digest.update(f"{path.relative_to(root).as_posix()} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


CORE = ("methods", "engine", "hf", "models")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def check_current(given: dict[str, Any]) -> None:
    """Refuse results that no commit stands for, or that another version of the core made.

    Args:
        given: the conditions in a result file.

    Raises:
        ValueError: a tree that had changes, no commit, or another version of st3 or its core.
    """
    commit = given.get("commit")
    if not commit:
        raise ValueError("these results name no commit: measure them in a checkout, committed")
    if commit.endswith("-dirty"):
        raise ValueError(f"these results are of a tree with changes ({commit}): commit, then run")
    if (given.get("st3"), given.get("engine")) != (st3.__version__, engine()):
        raise ValueError(
            f"these results are of st3 {given.get('st3')}, core {given.get('engine')} (commit "
            f"{commit}), and this is {st3.__version__}, core {engine()}: run them again"
        )


def in_words(given: dict[str, Any]) -> str:
    """One sentence of conditions."""
    threads = given["threads"]
    where = (
        f"{threads} CPU thread{'s' if threads > 1 else ''} of " if given["device"] == "cpu" else ""
    )
    parts = [
        f"{where}{given['machine']}",
        f"{given['dtype']}, {given['attention']}",
        f"torch {given['torch']}, transformers {given['transformers']}, Python {given['python']}",
        given["date"],
    ]
    if "freed_memory" in given:
        parts.append(f"freed memory: {given['freed_memory']}")
    if given["load_average"] is not None:
        parts.append(f"load average at the start {given['load_average']:.1f}")
    if given["commit"]:
        parts.append(f"st3 {given.get('st3')}, commit {given['commit']}")
    if given.get("seeds"):
        drawn = ", ".join(f"{what} {seed}" for what, seed in given["seeds"].items())
        parts.append(f"seeds: {drawn}")
    if "remark" in given:  # written into a result by hand
        parts.append(given["remark"])
    return "; ".join(parts)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} cores)"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _commit() -> str | None:
    """Of the checkout that this file lies in; None for an installed package."""
    # The results of earlier runs say nothing about what runs now.
    changes = ("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
    try:
        commit = _git("describe", "--always")
        return f"{commit}-dirty" if commit and _git(*changes) else commit or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    found = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return found.stdout.strip()
