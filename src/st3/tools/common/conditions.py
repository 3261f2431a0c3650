"""Where and how something was measured: goes into every result."""

from __future__ import annotations

import datetime
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
        parts.append(f"commit {given['commit']}")
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
