"""st3: trim the visual tokens of transformers vision-language models, in space and in time.

>>> import st3
>>> with st3.trim(model, "st3-7b") as trimmer:  # doctest: +SKIP
...     out = model.generate(**inputs, max_new_tokens=200)
>>> print(trimmer.report)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st3.errors import TrimStateError as TrimStateError
    from st3.errors import UnsupportedModelError as UnsupportedModelError
    from st3.methods.policies import Policy as Policy
    from st3.methods.policies import parse as parse
    from st3.methods.schedule import Anneal as Anneal
    from st3.methods.schedule import Schedule as Schedule
    from st3.report import Report as Report
    from st3.tools.common.bundled import bundled_model as bundled_model
    from st3.tools.common.bundled import sample_images as sample_images
    from st3.tools.see.kept import heatmap as heatmap
    from st3.tools.tune.vtw import calibrate_vtw as calibrate_vtw
    from st3.trimmer import Trimmer as Trimmer
    from st3.trimmer import trim as trim

__version__ = "0.1.0"

# Loaded at first use: torch and transformers take seconds, which `st3 --help` need not wait for.
# The policies (st3.ST3, st3.FastV ...) are found by themselves: see st3.methods.policies.
_HOMES = {
    "st3.errors": ("TrimStateError", "UnsupportedModelError"),
    "st3.methods.policies": ("Policy", "available", "parse", "presets", "register"),
    "st3.methods.schedule": ("Anneal", "Schedule"),
    "st3.report": ("Report",),
    "st3.tools.common.bundled": ("bundled_model", "sample_images"),
    "st3.tools.see.kept": ("heatmap",),
    "st3.trimmer": ("Trimmer", "trim"),
    "st3.tools.tune.vtw": ("calibrate_vtw",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("cost", "engine", "methods", "models", "tools")


def _policies() -> dict[str, Any]:
    """The classes of all registered policies by their names."""
    policies = importlib.import_module("st3.methods.policies")
    return {cls.__name__: cls for cls in policies.available().values()}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"st3.{name}")
    if name[:1].isupper() and name in (found := _policies()):
        return found[name]
    raise AttributeError(f"module 'st3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME_OF, *_MODULES, *_policies(), "__version__"])
