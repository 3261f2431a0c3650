"""Finding settings for a model: a policy and its budget, and VTW's layer.

    from st3.tools.tune import Candidates, Tuning, questions, sources

``st3 tune`` is the command line of the first.
"""

from typing import Any

_HOMES = {
    "candidates": ("BUDGETS", "Candidates", "sources"),
    "items": ("Questions", "questions", "read_goal"),
    "measure": ("AIMS",),
    "report": ("sentence", "write"),
    "tuning": ("Outcome", "Tuning"),
}


def __getattr__(name: str) -> Any:
    """At first use: VTW's calibration, of which ``import st3`` knows, needs none of it."""
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
