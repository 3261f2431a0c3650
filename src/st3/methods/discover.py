"""Import every module of a package, so that what its decorators register is known."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable


def import_all(package: str, path: Iterable[str]) -> None:
    """Import the modules of ``package``, found in its ``__path__``, in alphabetical order."""
    for module in pkgutil.iter_modules(path, f"{package}."):
        importlib.import_module(module.name)
