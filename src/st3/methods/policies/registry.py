"""The methods by name: registered by a decorator, read from strings."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from st3.errors import OtherModelWarning
from st3.methods.policies.base import Policy, default_of
from st3.methods.policies.budget import Budgeted, read_budget
from st3.methods.policies.saved import Saved, read, split
from st3.methods.schedule import Anneal

PolicyLike = str | Policy | os.PathLike[str]
"""What :func:`parse` reads."""

P = TypeVar("P", bound=type[Policy])
_POLICIES: dict[str, type[Policy]] = {}
_PRESETS: dict[str, Policy] = {}

FLAT = ("curve", "tau", "floor")  # an Anneal's fields, which a policy's options name as their own
SHOWN = 60  # characters of what nobody knows
_WORDS = {"none": None, "true": True, "false": False}


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


def parse(text: PolicyLike, **options: Any) -> Policy:
    """A policy from a string such as ``"st3"`` or ``"fastv:layer=2,drop=0.5"``.

    Lists are written ``3/7/16``, and policies as arguments in parentheses:
    ``"random:like=(fastv:drop=0.75,layer=3),seed=1"``. The fields of an :class:`~st3.Anneal` stand
    beside the others, here and among ``options``: ``"st3:tau=64,floor=0.1,curve=linear"``. What is
    not given stays as the preset has it, or the policy passed. Every method takes a ``budget``
    besides, "35%" or "0.35": the mean share of the visual tokens over the layers, to which its
    counts are scaled once the model's layers are known.

    A text that ends in ".json", or a path, names a file that ``st3 tune`` wrote.

    Args:
        text: a policy's string, or a policy, which is returned with other arguments.
        options: further arguments of the method, already as Python values.

    Returns:
        the policy; one with a budget is laid out when the model's layers are known.

    Raises:
        ValueError: unknown method or argument, a value out of its range, or a file that is none.
        TypeError: neither a policy nor a string.
    """
    if isinstance(text, os.PathLike):
        return _from_file(os.fspath(text), "", options)
    file = split(text) if isinstance(text, str) else None
    if file is not None:
        return _from_file(*file, options)
    return parse_text(text, **options)


def parse_text(text: str | Policy, **options: Any) -> Policy:
    """As :func:`parse`, without reading files: for what comes from elsewhere, such as requests."""
    if isinstance(text, Saved):
        return dataclasses.replace(text, policy=_changed(text.policy, options))
    if isinstance(text, Policy):
        return _changed(text, options)
    if not isinstance(text, str):
        raise TypeError(f"a policy is an st3 policy or a string such as 'st3', got {text!r}")
    name, _, arguments = text.strip().partition(":")
    start = _PRESETS.get(name) or _POLICIES.get(name)
    if start is None:
        known = [*_POLICIES, *_PRESETS]
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        shown = name if len(name) <= SHOWN else name[:SHOWN] + "..."
        raise ValueError(f"unknown policy {shown!r}: use one of {', '.join(known)}{hint}")
    return _changed(start, {**_read(start, arguments), **options})


def _from_file(path: str, arguments: str, options: dict[str, Any]) -> Policy:
    said, full, model = read(path)
    found = parse_text(said)
    if repr(found) != full:
        warnings.warn(
            f"{path} was written when {said!r} had other defaults: run st3 tune again",
            OtherModelWarning,
            stacklevel=3,
        )
    given = {**_read(found, arguments), **options}
    return Saved(_changed(found, given), model, path)


def _changed(start: Policy | type[Policy], values: Mapping[str, Any]) -> Policy:
    """``start``, a policy or a method with its defaults, with other arguments."""
    if not values and isinstance(start, Policy):
        return start
    budget = values.get("budget")
    if budget is not None:
        budget = read_budget(budget)
    if isinstance(start, Budgeted):
        budget = start.budget if budget is None else budget
        start = start.policy
    values = {key: value for key, value in values.items() if key != "budget"}
    fields = {field.name: field for field in dataclasses.fields(start)}
    flat = _flat(fields)
    for key in values:
        if key not in fields and key not in flat:
            takes = ", ".join([*fields, *flat, "budget"])
            raise ValueError(f"policy {start.name!r} has no argument {key!r}: it takes {takes}")
    given = {key: value for key, value in values.items() if key in fields}
    annealing = {key: value for key, value in values.items() if key in flat}
    if annealing:
        anneal = given.get("anneal", getattr(start, "anneal", default_of(fields["anneal"])))
        if anneal.curve == "none":  # a period or a floor alone says that it shall be
            annealing = {"curve": Anneal.curve, **annealing}
        given["anneal"] = dataclasses.replace(anneal, **annealing)
    made = start(**given) if isinstance(start, type) else dataclasses.replace(start, **given)
    return made if budget is None else Budgeted(made, budget)


def _flat(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return FLAT if "anneal" in fields else ()


def _read(start: Policy | type[Policy], text: str) -> dict[str, Any]:
    """The arguments that ``text``, "layer=2,drop=0.5", names, as Python values."""
    cls = start if isinstance(start, type) else type(start)
    hints = typing.get_type_hints(cls)
    if "anneal" in hints:
        hints |= typing.get_type_hints(Anneal)
    values = {}
    for part in filter(str.strip, re.split(r",(?![^(]*\))", text)):
        key, equals, raw = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not raw:
            raise ValueError(f"cannot read {part!r} in policy {cls.name!r}: write name=value")
        values[key] = raw if key == "budget" else _value(hints.get(key, str), raw)
    return values


def _value(hint: Any, raw: str) -> Any:
    """``raw`` as what ``hint`` wants, as far as it can be: the method itself refuses the rest."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if raw in _WORDS and type(_WORDS[raw]) in kinds:
        return _WORDS[raw]
    if Policy in kinds:
        return parse_text(raw[1:-1] if raw.startswith("(") and raw.endswith(")") else raw)
    if Anneal in kinds:
        return Anneal(curve=cast(Any, raw))
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(_number(part.strip()) for part in raw.split("/"))
    return _number(raw) if {int, float} & set(kinds) else raw


def _number(raw: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(raw)
        except ValueError:
            continue
    return raw
