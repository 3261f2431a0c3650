"""A policy laid out on a model: what the passes need to know of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from st3.engine.columns import Rows
from st3.engine.masks import Kind
from st3.methods.schedule import Schedule
from st3.methods.scores import Score, Stage, TokenView, needs_of, stage_of
from st3.models.families import Family, Parts
from st3.models.rotary import Unrotate

Attend = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Plan:
    """A policy laid out on a model.

    Attributes:
        schedule, score, rerank, recalls: the policy's.
        kind: the form of masks that the model's attention takes.
        windows: sliding window of each decoder layer, or None.
        per_image: whether each image has a budget of its own.
        unrotate: takes RoPE off queries and keys; None unless the score needs it.
        ranks: the processes that share the model's heads, or None.
    """

    schedule: Schedule
    score: Score
    rerank: int | None
    kind: Kind
    windows: tuple[int | None, ...]
    per_image: bool
    recalls: bool = False
    unrotate: Unrotate | None = None
    ranks: Any = None

    @cached_property
    def stage(self) -> Stage:
        """When the score is taken."""
        return stage_of(self.score)

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
        source = getattr(self.score, "source", lambda layer: layer)
        users: dict[int, list[int]] = {}
        for layer in range(self.schedule.num_layers):
            users.setdefault(source(layer), []).append(layer)
        return users

    @cached_property
    def waits(self) -> tuple[bool, ...]:
        """For each layer whether its score can wait until its cache is filed: when no drop and no
        later layer asks for it, and ranks would not wait for each other."""
        layers = range(self.schedule.num_layers)
        if self.stage != "attention" or self.ranks is not None:
            return (False,) * len(layers)
        last_row = getattr(self.score, "last_row", False)
        return tuple(
            last_row and len(self.users.get(layer, ())) == 1 and not self.drops_behind[layer]
            for layer in layers
        )

    @cached_property
    def prunes(self) -> tuple[bool, ...]:
        """For each layer whether visual tokens leave right before it."""
        return tuple(map(self.schedule.prunes, range(self.schedule.num_layers)))

    @cached_property
    def drops_behind(self) -> tuple[bool, ...]:
        """For each layer whether the one behind it sees fewer visual tokens."""
        return (*self.prunes[1:], False)

    def anneals(self, rows: Rows) -> tuple[bool, ...]:
        """For each layer whether it will ever show less than it stores of these rows."""
        budgets = self.budgets(rows)
        if budgets not in self._anneals:
            if len(self._anneals) > 64:
                self._anneals.clear()
            numbers = {n for row in budgets for n in row}
            self._anneals[budgets] = tuple(
                any(self._shown_for_ever(layer, n) < self.schedule.kept(layer, n) for n in numbers)
                for layer in range(self.schedule.num_layers)
            )
        return self._anneals[budgets]

    @cached_property
    def _anneals(self) -> dict[tuple[tuple[int, ...], ...], tuple[bool, ...]]:
        return {}

    def _shown_for_ever(self, layer: int, n_visual: int) -> int:
        return self.schedule.visible(layer, n_visual, 1 << 40)

    def stays(self, layer: int, rows: Rows) -> list[list[int]]:
        """The visual tokens that ``layer`` shows for ever, by row and budget."""
        return [[self._shown_for_ever(layer, n) for n in row] for row in self.budgets(rows)]

    def budgets(self, rows: Rows) -> tuple[tuple[int, ...], ...]:
        """The original visual counts that budgets are taken from: per row, or per image."""
        return rows.images if self.per_image else tuple((n,) for n in rows.n_visual)


@dataclass(frozen=True)
class Setup:
    """What a trimmer was asked for, and of which model.

    Attributes:
        policy: the policy, as a string for the report.
        touches: whether anything of a pass is changed.
        visual_mask, per_image, compile_decode, decode_bucket: see :func:`st3.trim`.
    """

    model: Any
    parts: Parts
    family: Family
    policy: str
    schedule: Schedule
    touches: bool
    per_image: bool
    visual_mask: Tensor | None
    compile_decode: str | dict[str, Any] | None
    decode_bucket: int
