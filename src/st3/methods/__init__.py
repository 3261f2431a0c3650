"""What is trimmed: how many visual tokens, which, and when. Knows nothing of transformers."""

from __future__ import annotations

import importlib
from typing import Any

DEFAULT_POLICY = "balanced"
"""The policy where none is named: of :func:`st3.trim` and of every command."""


def __getattr__(name: str) -> Any:
    if name in ("policies", "schedule", "scores"):  # imported when first asked for: torch is slow
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
