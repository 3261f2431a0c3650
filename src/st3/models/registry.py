"""All families, found by themselves in :mod:`st3.models.families`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import nn

from st3.errors import UnsupportedModelError
from st3.models import families as package
from st3.models.base import Family
from st3.models.parts import base_model
from st3.models.refused import REFUSED

_families: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known, in place of what was known under its ``model_type``."""
    _families[family.model_type] = family
    return family


def find() -> None:
    """Register the ``FAMILIES`` of every file in the package."""
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for family in importlib.import_module(module.name).FAMILIES:
            register(family)


find()


def families() -> tuple[Family, ...]:
    """All families that can be trimmed."""
    return tuple(_families.values())


def family_of(model: nn.Module, untested: bool = False) -> Family:
    """The family of a model, which may be wrapped by peft.

    Raises:
        UnsupportedModelError: refused or unknown families; an unknown one can be tried with
            ``untested=True`` if it has ``get_placeholder_mask``.
    """
    model = base_model(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _families:
        return _families[model_type]
    if model_type in REFUSED:
        raise UnsupportedModelError(f"{model_type} cannot be trimmed: {REFUSED[model_type]}")
    if model_type is None and isinstance(getattr(model, "module", None), nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps a model: trim the model inside, st3.trim(model.module). "
            "For several devices load it with device_map"
        )
    if untested and hasattr(getattr(model, "model", None), "get_placeholder_mask"):
        return Family(str(model_type), str(model_type), "untested")
    raise UnsupportedModelError(
        f"model type {model_type!r} is not a supported vision-language model. Supported: "
        f"{', '.join(_families)}. If it passes its visual tokens through get_placeholder_mask, try "
        "untested=True"
    )


def config_family(config: Any) -> Family:
    """The family that a config belongs to; for others, one of which nothing is known."""
    kind = config.model_type
    return _families.get(kind) or Family(kind, kind)
