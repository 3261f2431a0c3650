"""A policy laid out on a model and on vLLM's blocks. Knows nothing of vLLM.

In a layer that keeps ``k`` of a prompt's ``n`` visual tokens, what is left of the prompt takes the
LAST slots of its block table: ``n - k`` slots at the head are empty. The plan says how many of them
are whole blocks, which the pool gets back; a policy's count is thus rounded up to whole blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from st3.methods.policies import parse, with_budget
from st3.methods.schedule import Schedule
from st3.methods.scores import Score
from st3.vllm.prompt import Prompt

#: KV memory that larger groups may cost over one group per layer: fewer groups mean fewer block
#: tables to fill in each step.
SPARE = 1.10


@dataclass(frozen=True)
class Part:
    """A run of decoder layers that hold the same tokens and share a block table.

    Attributes:
        number: its place among the plan's parts.
        group: the KV cache group of its layers.
        first, end: its layers are ``range(first, end)``.
    """

    number: int
    group: int
    first: int
    end: int


@dataclass(frozen=True)
class Plan:
    """What scheduler and workers know of a policy. Both make it from three plain values, so that a
    KV cache spec can carry it between processes.

    Attributes:
        policy: its string, as :func:`st3.methods.policies.parse` reads it.
        num_layers: decoder layers of the model.
        group_size: layers that share a block table; divides ``num_layers``.
    """

    policy: str
    num_layers: int
    group_size: int

    @classmethod
    def choose(cls, policy: str, num_layers: int) -> Plan:
        """The plan with the largest groups whose memory is within :data:`SPARE` of the least."""
        schedule = parse(policy).schedule(num_layers)
        least = float(sum(schedule.shares))
        sizes = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
        fitting = [
            size for size in sizes if float(sum(schedule.shares[::size]) * size) <= SPARE * least
        ]
        return cls(policy, num_layers, max(fitting, default=1))

    @property
    def schedule(self) -> Schedule:
        return _schedule(self.policy, self.num_layers)

    @property
    def score(self) -> Score:
        return _score(self.policy, self.num_layers)

    @property
    def groups(self) -> int:
        return self.num_layers // self.group_size

    @property
    def parts(self) -> tuple[Part, ...]:
        return _parts(self)

    def parts_of(self, group: int) -> tuple[Part, ...]:
        """The parts of one KV cache group, in the order of their layers."""
        return tuple(part for part in self.parts if part.group == group)

    def skipped(self, layer: int, n_visual: int, step: int, block: int) -> int:
        """Empty slots at the head of a prompt, a multiple of ``block``.

        Args:
            layer: decoder layer.
            n_visual: the prompt's original visual tokens.
            step: 0 in prefill; the first generated token that is fed back is step 1.
            block: slots of a block.
        """
        return _skipped(self, layer, n_visual, step, block)

    def group_skipped(self, group: int, n_visual: int, step: int, block: int) -> int:
        """Empty slots that all layers of a group have in common: those of its first layer, as
        counts never rise with depth."""
        return self.skipped(group * self.group_size, n_visual, step, block)

    def mean_kept(self, n_visual: int, block: int) -> float:
        """Visual tokens held after prefill, mean over the layers."""
        dropped = sum(self.skipped(i, n_visual, 0, block) for i in range(self.num_layers))
        return n_visual - dropped / self.num_layers

    def can_drop(self, n_visual: int, block: int) -> bool:
        """Whether so many visual tokens ever leave a whole block empty."""
        return self.skipped(self.num_layers - 1, n_visual, 1 << 40, block) > 0

    def trims(self, prompt: Prompt, computed: int, new: int, block: int) -> bool:
        """Whether a request is trimmed, asked when it gets its first slots: all of its prompt is
        computed at once, and its visual tokens fill blocks. Scheduler and workers both ask this.

        Args:
            computed: its tokens that are in the cache.
            new: its tokens that are computed next.
        """
        whole = computed == 0 and new >= prompt.length
        return whole and self.can_drop(prompt.n_visual, block)


@functools.cache
def _schedule(policy: str, num_layers: int) -> Schedule:
    return parse(policy).schedule(num_layers)


@functools.cache
def _score(policy: str, num_layers: int) -> Score:
    return with_budget(parse(policy), num_layers).scorer()


@functools.lru_cache(maxsize=1 << 18)  # asked for by every request, part and step
def _skipped(plan: Plan, layer: int, n_visual: int, step: int, block: int) -> int:
    return (n_visual - plan.schedule.visible(layer, n_visual, step)) // block * block


@functools.cache
def _parts(plan: Plan) -> tuple[Part, ...]:
    schedule, parts, first = plan.schedule, list[Part](), 0
    for layer in range(1, plan.num_layers + 1):
        if layer < plan.num_layers and not (
            layer % plan.group_size == 0 or schedule.prunes(layer) or layer == schedule.anneal_from
        ):
            continue
        parts.append(Part(len(parts), first // plan.group_size, first, layer))
        first = layer
    return tuple(parts)
