"""Serve a trimmed model: an engine with continuous batching, and an OpenAI-compatible app.

>>> engine = Engine(model, processor, policy="balanced", kv_budget_bytes=4 << 30)  # doctest: +SKIP
>>> app = create_app(engine, Settings())  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st3.tools.serve.app import create_app
    from st3.tools.serve.engine import Engine
    from st3.tools.serve.settings import Settings

__all__ = ["Engine", "Settings", "create_app"]

_HOMES = {"Engine": "engine", "Settings": "settings", "create_app": "app"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'st3.tools.serve' has no attribute {name!r}")
    return getattr(importlib.import_module(f"st3.tools.serve.{_HOMES[name]}"), name)
