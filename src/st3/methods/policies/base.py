"""What a trimming method is: a schedule (how many), a score (which), a decode rule."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from st3.methods.schedule import Anneal, Schedule
from st3.methods.scores.attention import Attention
from st3.methods.scores.base import Score, stage_of


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

    @property
    def own_layer(self) -> bool:
        """Whether a drop goes by the attention that the layer which drops would have over all
        tokens that come to it, and not by that of the layer before."""
        return False

    @property
    def per_head(self) -> bool:
        """Whether each KV head of a layer goes by its own query heads where annealing hides visual
        tokens, so that heads keep different ones; drops in the prefill are of a layer as a whole.
        """
        return False

    def at_budget(self, num_layers: int, mean_keep: float) -> Policy:
        """This policy with its counts scaled so that the visual share, averaged over the layers,
        is ``mean_keep``; its other arguments stay.

        Raises:
            ValueError: a budget that the policy cannot have on so many layers.
        """
        raise ValueError(
            f"policy {self.name!r} has no way to a mean budget: give it an at_budget() method"
        )

    def __str__(self) -> str:
        """The shortest string that :func:`parse` turns back into this policy."""
        options = ",".join(
            _written(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != default_of(field)
        )
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True)
class Wrapped(Policy):
    """A policy that stands for another one, and differs from it only where it says so.

    Args:
        policy: the other one.
    """

    policy: Policy

    def schedule(self, num_layers: int) -> Schedule:
        return self.policy.schedule(num_layers)

    def scorer(self) -> Score:
        return self.policy.scorer()

    @property
    def rerank(self) -> int | None:
        return self.policy.rerank

    @property
    def recalls(self) -> bool:
        return self.policy.recalls

    @property
    def own_layer(self) -> bool:
        return self.policy.own_layer

    @property
    def per_head(self) -> bool:
        return self.policy.per_head

    def at_budget(self, num_layers: int, mean_keep: float) -> Policy:
        return self.policy.at_budget(num_layers, mean_keep)

    def __str__(self) -> str:
        return str(self.policy)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field; ``dataclasses.MISSING`` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _written(name: str, value: Any) -> str:
    """An argument as it stands in a policy's string."""
    if isinstance(value, Anneal):
        if value.curve == "none":
            return "curve=none"
        return f"curve={value.curve},tau={value.tau},floor={value.floor}"
    if isinstance(value, Policy):
        return f"{name}=({value})"
    if isinstance(value, tuple):
        return f"{name}={format_list(value)}"
    if value is None or isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    return f"{name}={value}"


def format_list(values: Sequence[Any]) -> str:
    """The way lists are written in strings, "3/7/16"."""
    return "/".join(map(str, values))


def check_ranked(policy: Policy, schedule: Schedule) -> None:
    """Raise ``ValueError`` where ``policy`` would drop tokens that nothing has ranked yet, or rank
    them as the engine cannot."""
    if schedule.prunes(0) and stage_of(policy.scorer()) != "embeds":
        raise ValueError(
            f"policy {policy} drops tokens before decoder layer 0, where nothing has ranked them "
            "yet: let its schedule keep all of them in layer 0, or rank by a score of the "
            "embeddings, such as divprune"
        )
    gives = getattr(policy.scorer(), "above", None) is not None
    if schedule.counted != gives or (gives and schedule.anneals):
        raise ValueError(
            f"policy {policy} takes its counts from the images, which its score does not give, or "
            "which cannot be annealed: give it a budget, or say how much is kept"
        )
    if policy.per_head:
        _check_per_head(policy, schedule)
    if policy.own_layer:
        raise ValueError(
            f"policy {policy} ranks in the layer that drops, which the engine cannot: leave "
            "own_layer out, to rank in the layer before"
        )


def _check_per_head(policy: Policy, schedule: Schedule) -> None:
    score = policy.scorer()
    taken: Any = getattr(score, "later", None) or score
    if not schedule.anneals or policy.rerank:
        raise ValueError(
            f"policy {policy} ranks per head, which counts where annealing hides tokens by the "
            "prompt's attention: leave per_head out, or curve=none, rerank_every and recall_every"
        )
    if stage_of(taken) != "attention" or getattr(taken, "lazy", False):
        raise ValueError(
            f"policy {policy} ranks per head, and its score is not taken in each layer's "
            "attention: use one that is, such as score=attention or score=mixed"
        )


def check_flag(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


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
