"""A policy laid out on a model: what the passes need to know of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from st3.engine.kv.visible import FOREVER
from st3.engine.masks import Kind
from st3.engine.prompt import Rows
from st3.engine.wiring import Wiring
from st3.errors import UnsupportedModelError
from st3.methods.laid import lay
from st3.methods.policies import Policy
from st3.methods.policies.base import check_ranked
from st3.methods.schedule import Schedule
from st3.methods.scores import LayerView, Score, Stage, TokenView, needs_of, stage_of

Unrotate = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
Attend = Callable[..., tuple[Tensor, Tensor | None]]
Budgets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """A policy laid out on a model.

    Attributes:
        schedule, score, rerank, recalls: the policy's.
        kind: the form of masks that the model's attention takes.
        windows: sliding window of each decoder layer, or None.
        wiring: where each decoder layer gets its keys and values from.
        per_image: whether each image has a budget of its own.
        unrotate: takes RoPE off queries and keys; None unless the score needs it.
        ranks: the processes that share the model's heads, or None.
        per_head: whether caches are ordered per KV head.
    """

    schedule: Schedule
    score: Score
    rerank: int | None
    kind: Kind
    windows: tuple[int | None, ...]
    wiring: Wiring
    per_image: bool
    recalls: bool = False
    unrotate: Unrotate | None = None
    ranks: Any = None
    per_head: bool = False

    @property
    def num_layers(self) -> int:
        return self.schedule.num_layers

    # The score ------------------------------------------------------------------------------------

    @cached_property
    def stage(self) -> Stage:
        """When the score is taken."""
        return stage_of(self.score)

    @cached_property
    def by_attention(self) -> Score | None:
        """What is taken in the layers' attention: the score itself, or the one that it names for
        the drops within the decoder; None if there is none."""
        later: Score | None = getattr(self.score, "later", None)
        return self.score if later is None and self.stage == "attention" else later

    @cached_property
    def note(self) -> Callable[[LayerView], Tensor] | None:
        """What the score takes of a layer's attention for the layer behind it."""
        return getattr(self.score, "note", None)

    @cached_property
    def turn(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """What the score takes of the attention and the MLP of each layer of :attr:`turns`."""
        return getattr(self.score, "turn", None)

    @cached_property
    def turns(self) -> range:
        """The layers whose parts are looked at: from the one before the first drop on."""
        drops = [layer for layer, prunes in enumerate(self.prunes) if prunes]
        if self.turn is None:
            return range(0)
        return range(max(0, drops[0] - 1), drops[-1]) if drops else range(self.num_layers)

    @cached_property
    def above(self) -> float | None:
        """The score that a visual token must exceed to enter layer 0; None where counts are the
        schedule's alone."""
        return getattr(self.score, "above", None)

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the score asks for."""
        return needs_of(self.score)

    @cached_property
    def prepare(self) -> Callable[[TokenView], Tensor] | None:
        """What the score does once, in layer 0."""
        return getattr(self.score, "prepare", None)

    @cached_property
    def users(self) -> dict[int, list[int]]:
        """The decoder layers that use a layer's score: itself, and perhaps later ones."""
        source = getattr(self.by_attention, "source", lambda layer: layer)
        users: dict[int, list[int]] = {}
        scorers, sources = self.wiring.scorers, self.wiring.sources
        for layer in range(self.num_layers):
            scorer = scorers[source(layer)]
            if scorer is not None and (sources[layer] == layer or self.drops_behind[layer]):
                users.setdefault(scorer, []).append(layer)
        return users

    @cached_property
    def deferrable(self) -> tuple[bool, ...]:
        """For each layer whether its score can wait until the prompt is written to the cache: when
        no drop and no later layer asks for it, and ranks would not wait for each other."""
        if self.by_attention is None or self.ranks is not None:
            return (False,) * self.num_layers
        last_row = getattr(self.by_attention, "last_row", False)
        return tuple(
            last_row and len(self.users.get(layer, ())) == 1 and not drops
            for layer, drops in enumerate(self.drops_behind)
        )

    # The schedule ---------------------------------------------------------------------------------

    @cached_property
    def prunes(self) -> tuple[bool, ...]:
        """For each layer whether visual tokens leave right before it."""
        return tuple(map(self.schedule.prunes, range(self.num_layers)))

    @cached_property
    def drops_behind(self) -> tuple[bool, ...]:
        """For each layer whether tokens are chosen for the one behind it, which sees fewer. The
        first layer that shares another one's entries sees none: there is nothing to choose."""
        shared = self.wiring.first_shared
        return (*(prunes and i != shared for i, prunes in enumerate(self.prunes) if i), False)

    def budgets(self, rows: Rows) -> Budgets:
        """The original visual counts that budgets are taken from: per row, or per image."""
        return rows.images if self.per_image else tuple((n,) for n in rows.n_visual)

    def kept(self, layer: int, budgets: Budgets) -> Budgets:
        """The visual tokens that enter ``layer``, by row and budget."""
        return tuple(tuple(self.schedule.kept(layer, n) for n in row) for row in budgets)

    def anneals(self, budgets: Budgets) -> tuple[bool, ...]:
        """For each layer whether it will ever show less than it stores of these rows."""
        numbers = frozenset(n for row in budgets for n in row)
        return _anneals(self.schedule, numbers, self.wiring.own)


def lay_out(policy: Policy, wiring: Wiring, windows: Sequence[int | None] = ()) -> Schedule:
    """The schedule of a policy on a decoder, whose layers may have sliding ``windows``.

    Raises:
        ValueError: if it does not fit the number of layers, or drops tokens where nothing has
            ranked them.
        UnsupportedModelError: if nothing of it can be done on this decoder.
    """
    score, layers = policy.scorer(), len(wiring.sources)
    if wiring.plain:
        schedule = policy.schedule(layers)
    else:
        of_attention = stage_of(score) == "attention" or "keys" in needs_of(score)
        first = wiring.own[0] + 1 if of_attention else 0
        schedule = lay(policy, layers, first, wiring.first_shared, wiring.borrows, wiring.in_order)
        _check_order(policy, schedule, wiring)
    check_ranked(policy, schedule)
    if policy.per_head and any(window is not None for window in windows):
        raise UnsupportedModelError(
            "this model's sliding windows go by the places of the entries, which its heads would "
            "not share: leave per_head out"
        )
    return schedule


def _check_order(policy: Policy, schedule: Schedule, wiring: Wiring) -> None:
    if wiring.in_order and (policy.rerank or policy.recalls):
        raise UnsupportedModelError(
            "this model's indexes count KV entries by column, which a new ranking would mix up: "
            "leave rerank_every and recall_every at None"
        )
    if policy.schedule(len(wiring.sources)).drops and not schedule.drops:
        able = [i for i in range(wiring.own[0] + 1, len(wiring.sources)) if not wiring.waits(i)]
        raise UnsupportedModelError(
            f"{policy} would do nothing here: this model's indexes count KV entries by column, so "
            f"that none can be annealed, and tokens can leave before layers {_names(able)} alone"
        )


def _names(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


@lru_cache(maxsize=64)
def _anneals(schedule: Schedule, numbers: frozenset[int], own: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(
        layer in own
        and any(schedule.visible(layer, n, FOREVER) < schedule.kept(layer, n) for n in numbers)
        for layer in range(schedule.num_layers)
    )
