"""What a trimming method is: a schedule (how many), a score (which), a decode rule; and the
registry that finds methods by name."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self, TypeVar

from st3.methods.schedule import Anneal, Schedule, check_share, exact
from st3.methods.scores import Attention, Score


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
        return Attention()

    @property
    def rerank(self) -> int | None:
        """Decode steps after which the visual tokens are ranked anew by the current token's
        attention, or None."""
        return None

    @property
    def recalls(self) -> bool:
        """Whether that ranking is of all stored visual tokens, hidden ones included, and not only
        of those that are still visible. Nothing that annealing hides is freed then."""
        return False

    def at_budget(self, num_layers: int, mean_keep: float) -> Policy:
        """This policy with its counts scaled so that the visual share, averaged over the layers,
        is ``mean_keep``; its other arguments stay.

        Raises:
            ValueError: a budget that the policy cannot have on so many layers.
        """
        raise ValueError(
            f"policy {self.name!r} has no way to a mean budget: give it a at_budget() method"
        )

    def __str__(self) -> str:
        """The shortest string that :func:`parse` turns back into this policy."""
        options = ",".join(
            _format_option(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != _default(field)
        )
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True)
class Staged(Policy):
    """A method that drops at a few given layers.

    Args:
        layers: first decoder layers (0-based) that see fewer visual tokens, written "3/7/16"; None
            has those of the paper's 32 layers at the same depth.
        keep: share of the original visual tokens left at each of them, written "0.5/0.25".
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] = ()

    paper_layers: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        layers = self.paper_layers if self.layers is None else self.layers
        if not isinstance(layers, tuple) or not isinstance(self.keep, tuple):
            raise ValueError(
                "layers and keep must be tuples, such as layers=(3, 7), keep=(0.5, 0.2)"
            )
        if len(layers) != len(self.keep) or not layers:
            raise ValueError(
                f"{self.name!r} has {len(layers)} layers and {len(self.keep)} shares: give one "
                "share for each layer"
            )
        for layer in layers:
            check_layer("layers", layer)
        if layers[0] < 1 or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must rise and start at 1 or later, got {format_list(layers)}")
        for share in self.keep:
            check_share("keep", share)
        if list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"keep must fall with depth, got {format_list(self.keep)}")

    def layers_for(self, num_layers: int) -> tuple[int, ...]:
        """The layers of the drops on a model of ``num_layers`` layers.

        Raises:
            ValueError: a model with too few layers.
        """
        if self.layers is not None:
            for layer in self.layers:
                check_layer("layers", layer, num_layers)
            return self.layers
        scaled: list[int] = []
        for layer in self.paper_layers:
            least = scaled[-1] + 1 if scaled else 1
            scaled.append(max(least, round(layer * num_layers / PAPER_LAYERS)))
        if scaled[-1] >= num_layers:
            raise ValueError(
                f"{len(scaled)} drops do not fit {num_layers} decoder layers: give layers and keep"
            )
        return tuple(scaled)

    def schedule(self, num_layers: int) -> Schedule:
        return stage_schedule(num_layers, self.layers_for(num_layers), self.keep)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        def scaled(factor: float) -> tuple[float, ...]:
            return tuple(min(1.0, round(factor * share, 12)) for share in self.keep)

        layers = self.layers_for(num_layers)
        check_within(mean_keep, num_layers, layers[0], "layers")
        first = next((share for share in reversed(self.keep) if share), None)
        if first is None:
            raise ValueError(f"keep={format_list(self.keep)} keeps nothing that could be scaled")
        factor = solve(
            lambda f: stage_schedule(num_layers, layers, scaled(f)).mean_share, mean_keep, 1 / first
        )
        return dataclasses.replace(self, keep=scaled(factor))


@dataclass(frozen=True)
class BeforeDecoder(Policy):
    """A method that drops tokens before the decoder's first layer.

    Args:
        keep: share of the visual tokens kept.
    """

    keep: float = 0.333

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def schedule(self, num_layers: int) -> Schedule:
        return Schedule((exact(self.keep),) * num_layers)

    def at_budget(self, num_layers: int, mean_keep: float) -> Self:
        check_share("mean_keep", mean_keep)
        return dataclasses.replace(self, keep=mean_keep)


PAPER_LAYERS = 32  # of LLaVA-1.5-7B, on which the papers state their layers


def stage_schedule(
    num_layers: int, layers: Sequence[int], keep: Sequence[float | Fraction]
) -> Schedule:
    """All tokens, then ``keep[i]`` of them from ``layers[i]`` on."""
    shares = [Fraction(1)] * num_layers
    for layer, share in zip(layers, keep, strict=True):
        shares[layer:] = [exact(share)] * (num_layers - layer)
    return Schedule(tuple(shares))


def check_within(mean_keep: float, num_layers: int, first: int, name: str) -> None:
    """Raise ``ValueError`` for a budget that the layers before ``first`` alone exceed."""
    check_share("mean_keep", mean_keep)
    if exact(mean_keep) * num_layers < first:
        raise ValueError(
            f"a mean share of {mean_keep:.1%} cannot be had: the first {first} of {num_layers} "
            f"layers alone are {first / num_layers:.1%}. Use a smaller {name}"
        )


def solve(mean_share: Callable[[float], float], wanted: float, high: float) -> float:
    """The largest argument in [0, high], by bisection, at which the rising ``mean_share`` does not
    exceed ``wanted``."""
    low = 0.0
    if mean_share(high) <= wanted + 1e-12:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        if mean_share(middle) <= wanted + 1e-12:
            low = middle
        else:
            high = middle
    return low


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
    listed = next((kind for kind in kinds if typing.get_origin(kind) is tuple), None)
    if listed is not None:
        item = typing.get_args(listed)[0]
        return tuple(_convert(cls, key, item, part.strip()) for part in raw.split("/"))
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
    if isinstance(value, tuple):
        return f"{name}={format_list(value)}"
    return f"{name}={'none' if value is None else value}"


def format_list(values: Sequence[Any]) -> str:
    """The way lists are written in strings, "3/7/16"."""
    return "/".join(map(str, values))


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
