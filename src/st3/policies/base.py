"""What a trimming method is: a schedule (how many), a score (which), a decode rule; and the
registry that finds methods by name."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from st3.schedule import Anneal, Schedule
from st3.scores import LastRowAttention, Score


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all trimming methods. A method is a frozen dataclass that says its schedule.

    Class attributes:
        name: how the method is called on the command line and in tables.
        paper: its source.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @abstractmethod
    def schedule(self, num_layers: int) -> Schedule:
        """The counts on a model of ``num_layers`` decoder layers.

        Raises:
            ValueError: if the method cannot be laid out on so many layers.
        """

    def scorer(self) -> Score:
        """By what the visual tokens are ranked."""
        return LastRowAttention()

    @property
    def rerank(self) -> int | None:
        """Decode steps after which the visible visual tokens are ranked anew, or None."""
        return None

    def __str__(self) -> str:
        """The shortest string that :func:`parse` turns back into this policy."""
        options = ",".join(
            _format_option(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != _default(field)
        )
        return f"{self.name}:{options}" if options else self.name


P = TypeVar("P", bound=type[Policy])
_POLICIES: dict[str, type[Policy]] = {}
_PRESETS: dict[str, Policy] = {}


def register(cls: P) -> P:
    """Class decorator: make a method known under its ``name``."""
    _POLICIES[cls.name] = cls
    return cls


def register_preset(name: str, policy: Policy) -> None:
    """Give a policy with its arguments a name of its own."""
    _PRESETS[name] = policy


def available() -> dict[str, type[Policy]]:
    """All registered methods by name."""
    return dict(_POLICIES)


def presets() -> dict[str, Policy]:
    """All named presets."""
    return dict(_PRESETS)


def parse(text: str | Policy, **options: Any) -> Policy:
    """A policy from a string such as ``"st3"`` or ``"fastv:layer=2,drop=0.5"``.

    Values that hold commas stand in parentheses: ``"random:like=(fastv:drop=0.75),seed=1"``. The
    fields of an :class:`~st3.Anneal` are written flat: ``"st3:tau=64,floor=0.1,curve=linear"``.

    Args:
        options: further arguments of the method, already as Python values.

    Raises:
        ValueError: unknown method or argument, or a value out of its range.
    """
    if isinstance(text, Policy):
        return dataclasses.replace(text, **options) if options else text
    if not isinstance(text, str):
        raise TypeError(f"a policy is an st3 policy or a string such as 'st3', got {text!r}")
    name, _, arguments = text.strip().partition(":")
    start: Policy | None = _PRESETS.get(name)
    cls = type(start) if start is not None else _POLICIES.get(name)
    if cls is None:
        known = ", ".join([*_POLICIES, *_PRESETS])
        raise ValueError(f"unknown policy {name!r}: use one of {known}")
    values = {**_parse_arguments(cls, arguments), **options}
    known_fields = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known_fields:
            raise ValueError(_unknown_argument(cls, key))
    return dataclasses.replace(start, **values) if start is not None else cls(**values)


def _parse_arguments(cls: type[Policy], text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    anneal: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^(]*\))", text)):
        key, equals, raw = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not raw:
            raise ValueError(f"cannot read {part!r} in policy {cls.name!r}: write name=value")
        if key in fields:
            values[key] = _convert(cls, key, hints[key], raw)
        elif "anneal" in fields and key in ("curve", "tau", "floor"):
            anneal[key] = raw if key == "curve" else _number(cls, key, raw)
        else:
            raise ValueError(_unknown_argument(cls, key))
    if anneal:
        values["anneal"] = dataclasses.replace(_default(fields["anneal"]), **anneal)
    return values


def _convert(cls: type[Policy], key: str, hint: Any, raw: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if raw == "none" and type(None) in kinds:
        return None
    if Anneal in kinds:
        return Anneal(curve=typing.cast(Any, raw))
    if Policy in kinds:
        return parse(raw[1:-1] if raw.startswith("(") and raw.endswith(")") else raw)
    if int in kinds or float in kinds:
        number = _number(cls, key, raw)
        if float not in kinds and number != int(number):
            raise ValueError(f"{key} of policy {cls.name!r} must be a whole number, got {raw}")
        return number if float in kinds else int(number)
    return raw


def _number(cls: type[Policy], key: str, raw: str) -> float:
    try:
        number = float(raw)
    except ValueError:
        raise ValueError(f"{key} of policy {cls.name!r} must be a number, got {raw!r}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{key} of policy {cls.name!r} must be a finite number, got {raw}")
    return number


def _unknown_argument(cls: type[Policy], key: str) -> str:
    names = [field.name for field in dataclasses.fields(cls)]
    if "anneal" in names:
        names += ["curve", "tau", "floor"]
    return f"policy {cls.name!r} has no argument {key!r}: it takes {', '.join(names) or 'none'}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _format_option(name: str, value: Any) -> str:
    if isinstance(value, Anneal):
        if value.curve == "none":
            return "curve=none"
        return f"curve={value.curve},tau={value.tau},floor={value.floor}"
    if isinstance(value, Policy):
        return f"{name}=({value})"
    return f"{name}={'none' if value is None else value}"


def check_layer(name: str, layer: int | None, num_layers: int | None = None) -> None:
    """Raise ``ValueError`` unless ``layer`` is a whole number >= 0, and below ``num_layers``."""
    if layer is None:
        return
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"{name} must be a decoder layer counted from 0, got {layer!r}")
    if num_layers is not None and layer >= num_layers:
        raise ValueError(
            f"{name}={layer} lies behind the last of this model's {num_layers} decoder layers: "
            f"use at most {num_layers - 1}"
        )
