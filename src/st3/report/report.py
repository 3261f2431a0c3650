"""What a trimmed run did: counts per layer, FLOPs, KV memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from st3.cost import TextDims, prefill_flops
from st3.engine.events import PromptEvent
from st3.engine.kv.timeline import Timeline
from st3.engine.prompt import Block
from st3.methods.laid import Laid
from st3.methods.schedule import Schedule
from st3.report import show


@dataclass(frozen=True)
class KVSample:
    """KV bytes of the whole batch after a forward pass."""

    step: int
    live: int
    allocated: int


@dataclass(repr=False)
class Report:
    """The latest prompt with an image that a trimmed model ran, and the generation after it.

    Attributes:
        policy: the policy, as a string that :func:`st3.methods.policies.parse` reads.
        schedule: its counts on this model.
        visual_per_image: for each row of the batch the visual tokens of each image (or video). An
            image is a run of visual tokens; where a family puts marker tokens between tiles or
            rows of patches, each run counts.
        n_text: for each row its other prompt tokens.
        n_past: for each row the tokens of earlier turns, in the cache before the prompt. FLOPs are
            those of the prompt alone: what it spends on attention to earlier turns is not counted.
        budgets: for each row the counts that the schedule's shares are taken of: all visual tokens,
            or those that the images themselves keep.
        lacks_tower: whether the score went another way, as the vision tower's attention could not
            be followed to the tokens.
        samples: KV bytes after the prefill and after each decode step.
        entry_bytes: bytes of one KV entry (key and value) in each layer.
    """

    policy: str
    schedule: Schedule
    visual_per_image: tuple[tuple[int, ...], ...]
    n_text: tuple[int, ...]
    n_past: tuple[int, ...]
    budgets: tuple[tuple[int, ...], ...]
    dims: TextDims | None
    entry_bytes: tuple[int, ...]
    lacks_tower: bool = False
    samples: list[KVSample] = field(default_factory=list)
    _blocks: dict[int, Block] = field(default_factory=dict, repr=False)  # by first layer
    _timeline: Timeline | None = field(default=None, repr=False)
    _steps: int = field(default=0, repr=False)

    @classmethod
    def of(
        cls, policy: str, schedule: Schedule, dims: TextDims | None, event: PromptEvent
    ) -> Report:
        """A report on a prompt whose prefill starts now.

        Args:
            dims: of the decoder; None if the cost model does not describe it.
        """
        size = torch.empty((), dtype=event.chunk.embeds.dtype).element_size()
        entries = tuple(la.held * size for la in dims.layers) if dims else ()
        rows = event.rows
        return cls(
            policy,
            schedule,
            rows.images,
            tuple(n - rows.tail for n in rows.n_text),
            event.n_past,
            event.budgets,
            dims,
            entries,
            event.lacks_tower,
            _timeline=event.timeline,
        )

    @property
    def steps(self) -> int:
        """Decode steps after the prompt; the first generated token comes from the prefill. In
        assisted decoding candidates that were rejected do not count (untrimmed: those of the last
        check do)."""
        return self._steps if self._timeline is None else self._timeline.steps

    # Counts ---------------------------------------------------------------------------------------

    @cached_property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """For each row the visual tokens that entered each decoder layer."""
        kept, layers = self.schedule.kept, range(self.schedule.num_layers)
        return tuple(tuple(sum(kept(la, n) for n in row) for la in layers) for row in self.budgets)

    @property
    def n_visual(self) -> list[int]:
        """Visual tokens of each row."""
        return [sum(images) for images in self.visual_per_image]

    @property
    def mean_share(self) -> float:
        """Share of the visual tokens that entered a layer, mean over layers and rows."""
        total = sum(self.n_visual) * self.schedule.num_layers
        return sum(map(sum, self.kept)) / total if total else 1.0

    @property
    def put_off(self) -> tuple[int, ...]:
        """The layers before which the policy would drop tokens, but nothing has ranked them yet
        (they leave before :attr:`first_drop`), or the layer goes by columns of the one before."""
        return self.schedule.put_off if isinstance(self.schedule, Laid) else ()

    @property
    def not_annealed(self) -> bool:
        """Whether the policy would anneal, but this decoder's indexes count KV entries by column,
        so that none can leave."""
        return isinstance(self.schedule, Laid) and self.schedule.not_annealed

    @property
    def first_drop(self) -> int | None:
        """The first layer that sees fewer visual tokens than the prompt has; None if none does."""
        prunes = self.schedule.prunes
        return next((la for la in range(self.schedule.num_layers) if prunes(la)), None)

    def kept_positions(self, layer: int, row: int = 0) -> Tensor:
        """Which of the row's visual tokens entered ``layer``: ascending indices among the row's
        ``n_visual[row]`` visual tokens, a LongTensor on the CPU.

        Raises:
            ValueError: for a layer or row that does not exist.
        """
        if not 0 <= layer < self.schedule.num_layers:
            raise ValueError(f"layer {layer} does not exist: 0 to {self.schedule.num_layers - 1}")
        if not 0 <= row < len(self.n_text):
            raise ValueError(f"row {row} does not exist: 0 to {len(self.n_text) - 1}")
        first = max((at for at in self._blocks if at <= layer), default=None)
        if first is None:
            return torch.arange(self.n_visual[row])
        block = self._blocks[first]
        return block.ordinal[row][block.visual[row]].cpu()

    # FLOPs ----------------------------------------------------------------------------------------

    def _flops(self, trimmed: bool) -> int | None:
        if self.dims is None:
            return None
        total = 0
        for n_text, n_visual, kept in zip(self.n_text, self.n_visual, self.kept, strict=True):
            counts = _Counts(kept) if trimmed else None
            total += prefill_flops(self.dims, n_text, n_visual, counts).total
        return total

    @property
    def prefill_flops(self) -> int | None:
        """FLOPs of the text decoder's prefill, all rows; None for an unknown decoder."""
        return self._flops(trimmed=True)

    @property
    def untrimmed_prefill_flops(self) -> int | None:
        """What the same prefill costs untrimmed."""
        return self._flops(trimmed=False)

    @property
    def prefill_flops_ratio(self) -> float | None:
        """Trimmed over untrimmed prefill FLOPs, 0..1."""
        trimmed, untrimmed = self.prefill_flops, self.untrimmed_prefill_flops
        return None if trimmed is None or not untrimmed else trimmed / untrimmed

    # KV memory ------------------------------------------------------------------------------------

    def untrimmed_bytes(self, step: int) -> int:
        """Bytes of the KV entries that the bare model holds after ``step``; padding not counted."""
        windows = (
            [la.window for la in self.dims.layers] if self.dims else [None] * len(self.entry_bytes)
        )
        total = 0
        for size, window in zip(self.entry_bytes, windows, strict=True):
            for counts in zip(self.n_past, self.n_text, self.n_visual, strict=True):
                entries = sum(counts) + step
                total += size * (entries if window is None else min(entries, window - 1))
        return total

    def _last(self) -> KVSample:
        if self.samples:
            return self.samples[-1]
        untrimmed = self.untrimmed_bytes(self.steps)
        return KVSample(self.steps, untrimmed, untrimmed)

    @property
    def kv_live_bytes(self) -> int:
        """Bytes of the KV entries that the last step could see, whole batch."""
        return self._last().live

    @property
    def kv_allocated_bytes(self) -> int:
        """Bytes of the buffers that hold them, padding and headroom included."""
        return self._last().allocated

    @property
    def kv_untrimmed_bytes(self) -> int:
        """Bytes that the bare model's entries would take at the same step."""
        return self.untrimmed_bytes(self._last().step)

    def _mean_ratio(self, of: str) -> float:
        if not self.samples:
            return 1.0
        untrimmed = sum(self.untrimmed_bytes(sample.step) for sample in self.samples)
        return sum(getattr(sample, of) for sample in self.samples) / max(untrimmed, 1)

    @property
    def kv_mean_ratio(self) -> float:
        """Live over untrimmed KV bytes, both averaged over prefill and decode steps."""
        return self._mean_ratio("live")

    @property
    def kv_mean_allocated_ratio(self) -> float:
        """Allocated over untrimmed KV bytes, both averaged over prefill and decode steps."""
        return self._mean_ratio("allocated")

    # For people -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        names = (
            "policy n_visual visual_per_image n_text n_past kept put_off not_annealed mean_share"
            " prefill_flops prefill_flops_ratio kv_live_bytes kv_allocated_bytes kv_untrimmed_bytes"
            " kv_mean_ratio kv_mean_allocated_ratio steps"
        )
        return {name: getattr(self, name) for name in names.split()}

    def to_json(self, indent: int | None = None) -> str:
        """The same as a JSON object."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        return show.text(self)

    def __repr__(self) -> str:
        return show.one_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the figures, and visual tokens by layer as a small chart."""
        return show.html(self)

    def plot(self, axes: Any = None) -> Any:
        """Draw the visual tokens that each layer saw, one line for each row of the batch.

        Args:
            axes: of matplotlib, to draw into; None: new ones.

        Returns:
            the axes.

        Raises:
            ImportError: matplotlib is not installed (``pip install 'st3[plot]'``).
        """
        return show.plot(self, axes)


@dataclass(frozen=True)
class _Counts:
    """A row's counts, in the form the cost model asks for."""

    counts: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.counts)

    def kept(self, layer: int, n_visual: int) -> int:
        return self.counts[layer]

    def visible(self, layer: int, n_visual: int, step: int) -> int:
        return self.counts[layer]
