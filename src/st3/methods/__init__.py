"""What is trimmed: how many visual tokens, which, and when. Knows nothing of transformers."""

from __future__ import annotations

import importlib
from typing import Any

DEFAULT_POLICY = "thirds"
"""The policy where none is named: of :func:`st3.trim` and of every command."""

DEFAULT_IN_VLLM = "balanced"
"""The same inside of vLLM, which hands out no attention of the vision tower and takes one score for
all of a prompt's drops."""


def __getattr__(name: str) -> Any:
    if name in ("policies", "schedule", "scores"):  # imported when first asked for: torch is slow
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
