"""The trimming methods, one a file. A class with ``@register`` in any module of this package is
known by its name, and is an attribute of this package and of :mod:`st3`."""

from __future__ import annotations

from typing import Any

from st3.methods.discover import import_all
from st3.methods.policies.base import Policy
from st3.methods.policies.budget import read_budget, with_budget
from st3.methods.policies.registry import (
    PolicyLike,
    available,
    parse,
    parse_text,
    presets,
    register,
    register_preset,
)
from st3.methods.policies.saved import check_model, plain

__all__ = [
    "Policy",
    "PolicyLike",
    "available",
    "check_model",
    "parse",
    "parse_text",
    "plain",
    "presets",
    "read_budget",
    "register",
    "register_preset",
    "with_budget",
]

import_all(__name__, __path__)


def __getattr__(name: str) -> Any:
    for cls in available().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
