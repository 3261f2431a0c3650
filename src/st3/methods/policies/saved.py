"""A policy in a file, as ``st3 tune`` writes it: its string, and the model it was found for."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from st3.errors import OtherModelWarning
from st3.methods.policies.base import Policy, Wrapped

T = TypeVar("T")
_FILE = re.compile(r"(.+\.json)(?::(.*))?")


@dataclass(frozen=True)
class ModelFacts:
    """What tells a model from another one, as far as its config says it.

    Attributes:
        name: the last part of its folder or hub id; empty where it has none.
        type: ``model_type`` of its config.
        layers: decoder layers.
    """

    name: str
    type: str
    layers: int

    def __str__(self) -> str:
        return f"{self.name or 'a model without a name'} ({self.type}, {self.layers} layers)"


@dataclass(frozen=True)
class Saved(Wrapped):
    """A policy read from a file, with the model that it was found for.

    Made by :func:`~st3.methods.policies.registry.parse` from "policy.json".
    """

    model: ModelFacts
    file: str

    name: ClassVar[str] = "saved"


def plain(policy: Policy) -> Policy:
    """``policy`` itself, or what a file said that it is."""
    return policy.policy if isinstance(policy, Saved) else policy


def check_model(policy: Policy, model: ModelFacts) -> None:
    """Whether a policy was found for this model; one that is of no file fits every model.

    Raises:
        ValueError: it was found for a model of another kind or depth; names both.

    Warns:
        OtherModelWarning: kind and depth are the same, the name is another; names both.
    """
    if not isinstance(policy, Saved):
        return
    found = policy.model
    said = f"{policy.file} was found for {found}, and this model is {model}"
    if (found.type, found.layers) != (model.type, model.layers):
        raise ValueError(f"{said}: run st3 tune on this one")
    if found.name and model.name and found.name != model.name:
        warnings.warn(
            f"{said}: run st3 tune unless they are the same", OtherModelWarning, stacklevel=3
        )


def split(text: str) -> tuple[str, str] | None:
    """Of a policy's string that names a file its name and the arguments behind it,
    "policy.json:tau=64"; None for others."""
    found = _FILE.fullmatch(text.strip())
    return None if found is None else (found[1], found[2] or "")


def read(path: str) -> tuple[str, str, ModelFacts]:
    """Of a file the policy's string, what that was when it was written (``repr``: defaults may
    change), and the model.

    Raises:
        ValueError: no such file, or not one of ``st3 tune``.
    """
    try:
        data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the policy {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the policy {path} is not JSON: {error}") from error
    text = _item(path, data, "policy", str)
    if split(text):
        raise ValueError(f"{path} is no policy that st3 tune wrote: its policy is {text!r}")
    facts = _item(path, data, "model", dict)
    model = ModelFacts(
        _item(path, facts, "name", str),
        _item(path, facts, "type", str),
        _item(path, facts, "layers", int),
    )
    return text, _item(path, data, "policy_in_full", str), model


def _item(path: str, data: Any, key: str, kind: type[T]) -> T:
    """An entry of a file."""
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no policy that st3 tune wrote: it holds no object")
    if key not in data:
        raise ValueError(f"{path} is no policy that st3 tune wrote: {key!r} is missing")
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        shown = repr(value)[:40]
        raise ValueError(f"{path} is no policy that st3 tune wrote: its {key} is {shown}")
    return value


def to_dict(policy: Policy, model: ModelFacts) -> dict[str, Any]:
    """What :func:`read` reads."""
    return {"policy": str(policy), "policy_in_full": repr(policy), "model": asdict(model)}
