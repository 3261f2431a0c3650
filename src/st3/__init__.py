"""st3: trim the visual tokens of transformers vision-language models, in space and in time.

>>> import st3
>>> with st3.trim(model, st3.ST3(final_keep=0.01, stride=4)) as trimmer:  # doctest: +SKIP
...     out = model.generate(**inputs, max_new_tokens=200)
>>> print(trimmer.report)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st3 import policies
    from st3.bundled import bundled_model, sample_images
    from st3.calibrate import calibrate_vtw
    from st3.engine import Trimmer, TrimStateError, UnsupportedModelError, trim
    from st3.policies import (
        DART,
        FEATHER,
        ST3,
        VTW,
        CDPruner,
        DivPrune,
        DyCoke,
        FastV,
        KeyNormPruning,
        NoTrim,
        Policy,
        PyramidDrop,
        Random,
        SparseVLM,
        UniformGrid,
        V2Drop,
        VisionZip,
    )
    from st3.report import Report
    from st3.schedule import Anneal, Schedule

__version__ = "0.1.0"

# Loaded at first use: torch and transformers take seconds, which `st3 --help` need not wait for.
_HOMES = {
    "st3.bundled": ["bundled_model", "sample_images"],
    "st3.engine": ["TrimStateError", "Trimmer", "UnsupportedModelError", "trim"],
    "st3.calibrate": ["calibrate_vtw"],
    "st3.policies": [
        "DART",
        "FEATHER",
        "ST3",
        "VTW",
        "CDPruner",
        "DivPrune",
        "DyCoke",
        "FastV",
        "KeyNormPruning",
        "NoTrim",
        "Policy",
        "PyramidDrop",
        "Random",
        "SparseVLM",
        "UniformGrid",
        "V2Drop",
        "VisionZip",
    ],
    "st3.report": ["Report"],
    "st3.schedule": ["Anneal", "Schedule"],
}
_MODULES = ("bench", "cost", "engine", "policies", "report", "schedule", "scores", "shapes")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DART",
    "FEATHER",
    "ST3",
    "VTW",
    "Anneal",
    "CDPruner",
    "DivPrune",
    "DyCoke",
    "FastV",
    "KeyNormPruning",
    "NoTrim",
    "Policy",
    "PyramidDrop",
    "Random",
    "Report",
    "Schedule",
    "SparseVLM",
    "TrimStateError",
    "Trimmer",
    "UniformGrid",
    "UnsupportedModelError",
    "V2Drop",
    "VisionZip",
    "bundled_model",
    "calibrate_vtw",
    "policies",
    "sample_images",
    "trim",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"st3.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'st3' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
