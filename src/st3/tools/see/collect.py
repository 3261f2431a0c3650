"""Statistics of attention, summed up while the model runs: their size depends on the number of
decoder layers and of visual tokens alone, never on how much is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.models.places import Place
from st3.tools.see.watch import Prompt

GROUPS = ("visual", "system", "question", "generated")
"""Where attention goes: visual tokens; prompt text before the first of them; other prompt text
(after the first visual token); generated tokens."""

PREFILL, DECODE = 0, 1
LENGTHS = 64  # bins along the answer
PLACES = 12  # bins along an image's height and width


class ByLength:
    """Means along the answer's length in a fixed number of bins, whose width in tokens doubles when
    an answer grows out of them."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.width = 1
        self.sums = torch.zeros(LENGTHS, *shape, device=device)
        self.counts = torch.zeros(LENGTHS, device=device)

    def add(self, step: int, value: Tensor) -> None:
        """``step`` counts decode steps from 1."""
        while (step - 1) // self.width >= LENGTHS:
            for held in (self.sums, self.counts):
                merged = held.unflatten(0, (LENGTHS // 2, 2)).sum(1)
                held.zero_()
                held[: LENGTHS // 2] = merged
            self.width *= 2
        place = (step - 1) // self.width
        self.sums[place] += value
        self.counts[place] += 1

    def means(self) -> tuple[list[float], Tensor]:
        """Middle of each bin in tokens, and its means [bins, ...]; bins that saw nothing are left
        out."""
        there = (self.counts > 0).cpu()
        middle = (torch.arange(LENGTHS) + 0.5) * self.width + 0.5
        counts = self.counts.cpu()[there]
        sums = self.sums.cpu()[there]
        return middle[there].tolist(), sums / counts.view(-1, *[1] * (sums.dim() - 1))


@dataclass
class Bins:
    """How much each visual token belongs to each twelfth of the image's height and width, [V, 12];
    where places are unknown, to each twelfth of the tokens' order."""

    rows: Tensor
    columns: Tensor
    placed: bool

    @classmethod
    def of(cls, places: Sequence[Place] | None, count: int, device: torch.device) -> Bins:
        if places is None:
            edges = torch.arange(count + 1) / max(count, 1)
            order = _overlap(edges[:-1], edges[1:]).to(device)
            return cls(order, order, False)
        there = torch.tensor([place.box is not None for place in places])
        boxes = torch.tensor([place.box or (0.0, 0.0, 0.0, 0.0) for place in places])
        rows = _overlap(boxes[:, 1], boxes[:, 3]) * there[:, None]
        columns = _overlap(boxes[:, 0], boxes[:, 2]) * there[:, None]
        return cls(rows.to(device), columns.to(device), True)


def _overlap(start: Tensor, end: Tensor) -> Tensor:
    """The share of each interval [V] that lies in each of ``PLACES`` equal parts of [0, 1]."""
    edges = torch.linspace(0, 1, PLACES + 1)
    inside = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    return inside.clamp_min(0) / (end - start).clamp_min(1e-9)[:, None]


class Collector:
    """A :class:`~st3.tools.see.watch.Listener` that sums up the paper's measures.

    Args:
        num_layers: decoder layers L.
        keep: share of the visual tokens in a kept set: those that a layer attends to most.

    Attributes (sums over passes; ``[2, ...]`` is prefill, then decode steps):
        passes: [2].
        shares: [2, L, 4] attention on each of ``GROUPS``.
        cosine: [2, L, L] cosine similarity of the layers' attention over the visual tokens.
        divergence: [2, L] Jensen-Shannon similarity with the layer before: 1 minus the divergence
            in bits of the two distributions over the visual tokens; 0 in layer 0.
        high: [2, L] visual tokens with more attention than an even share of the whole row.
        holding: [2, L] fewest visual tokens that hold nine tenths of the visual attention.
        overlap: [2, L, L] share of a layer's kept set that is in another layer's.
        rows, columns: [L, 12] visual attention by place in the image, 1 where it is even.
        shares_by_length: [bins, L, 4]; same_as_first, same_as_before: [bins, L] share of a kept
            set that was in the prefill's, and in the step's before.
    """

    def __init__(self, num_layers: int, keep: float = 0.25) -> None:
        if not 0 < keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, got {keep}")
        self.layers, self.keep = num_layers, keep
        self.prompts, self.placed, self.visual_tokens, self.longest = 0, True, 0, 0
        self._next_places: Sequence[Place] | None = None
        self._ready = False

    def place(self, places: Sequence[Place] | None) -> None:
        """Say where the next prompt's visual tokens lie; None if that is not known."""
        self._next_places = places

    def _begin(self, device: torch.device) -> None:
        layers = self.layers

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.passes = [0, 0]
        self.shares = zeros(2, layers, len(GROUPS))
        self.cosine = zeros(2, layers, layers)
        self.overlap = zeros(2, layers, layers)
        self.divergence = zeros(2, layers)
        self.high = zeros(2, layers)
        self.holding = zeros(2, layers)
        self.rows = zeros(layers, PLACES)
        self.columns = zeros(layers, PLACES)
        self.shares_by_length = ByLength((layers, len(GROUPS)), device)
        self.same_as_first = ByLength((layers,), device)
        self.same_as_before = ByLength((layers,), device)
        self._ready = True

    # What a watcher calls -----------------------------------------------------------------------

    def prompt(self, prompt: Prompt) -> None:
        device, count = prompt.device, len(prompt.visual)
        if not self._ready:
            self._begin(device)
        places, self._next_places = self._next_places, None
        if places is not None and len(places) != count:
            raise ValueError(f"{len(places)} places for {count} visual tokens")
        self.prompts += 1
        self.visual_tokens += count
        self.placed &= places is not None
        self._count = count
        self._bins = Bins.of(places, count, device)
        # One entry for each column of the prompt, and a last one for all that is generated.
        self._slot = torch.full((prompt.length + 1,), count, device=device)
        self._slot[prompt.visual] = torch.arange(count, device=device)
        self._group = torch.full((prompt.length + 1,), GROUPS.index("question"), device=device)
        self._group[: int(prompt.visual[0])] = GROUPS.index("system")
        self._group[prompt.visual] = GROUPS.index("visual")
        self._group[-1] = GROUPS.index("generated")
        self._row = torch.zeros(self.layers, count + 1, device=device)
        self._share = torch.zeros(self.layers, len(GROUPS), device=device)
        self._even = torch.zeros(self.layers, device=device)
        self._first: Tensor | None = None
        self._before: Tensor | None = None
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def layer(self, layer: int, attention: Tensor, columns: Tensor) -> None:
        if self._known is None or self._known[0] is not columns:
            entry = columns.to(self._slot.device).clamp_max(len(self._slot) - 1)
            self._known = (columns, self._slot[entry], self._group[entry])
        _, slot, group = self._known
        attention = attention.to(slot.device)  # layers may be spread over devices
        self._row[layer] = 0
        self._row[layer].index_add_(0, slot, attention)
        self._share[layer] = 0
        self._share[layer].index_add_(0, group, attention)
        self._even[layer] = 1 / len(columns)

    def done(self, step: int) -> None:
        self._known = None
        phase = PREFILL if step == 0 else DECODE
        row = self._row[:, : self._count]
        mass = row.sum(1, keepdim=True).clamp_min(1e-30)
        part = row / mass
        self.passes[phase] += 1
        self.shares[phase] += self._share
        unit = row / row.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self.cosine[phase] += unit @ unit.T
        self.divergence[phase, 1:] += 1 - _jensen_shannon(part[1:], part[:-1])
        self.high[phase] += (row > self._even[:, None]).sum(1)
        ordered, order = part.sort(dim=1, descending=True)
        self.holding[phase] += (ordered.cumsum(1) < 0.9).sum(1) + 1
        size = max(1, round(self.keep * self._count))
        kept = torch.zeros_like(row).scatter_(1, order[:, :size], 1.0)
        self.overlap[phase] += kept @ kept.T / size
        for total, bins in ((self.rows, self._bins.rows), (self.columns, self._bins.columns)):
            total += part @ bins / bins.sum(0).clamp_min(1e-9) * self._count
        if self._first is None or self._before is None:
            self._first = kept
        else:
            self.longest = max(self.longest, step)
            self.shares_by_length.add(step, self._share)
            self.same_as_first.add(step, (kept * self._first).sum(1) / size)
            self.same_as_before.add(step, (kept * self._before).sum(1) / size)
        self._before = kept


def _jensen_shannon(left: Tensor, right: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits of distributions [..., V], between 0 and 1."""
    middle = (left + right) / 2
    return _entropy(middle) - (_entropy(left) + _entropy(right)) / 2


def _entropy(part: Tensor) -> Tensor:
    return -torch.xlogy(part, part).sum(-1) / torch.log(torch.tensor(2.0))
