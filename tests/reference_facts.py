"""What the slow reference is asked for, what its scores may look at, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Spans = list[list[tuple[int, int]]]


@dataclass
class Seen:
    """What a score may look at, in or at the input of a layer. All tokens are there; ``kept`` says
    which of them the layer still has (at its input: the layer before)."""

    layer: int
    inputs: dict[int, Tensor]  # [B, T, D], by layer
    kept: Tensor  # bool [B, T]
    visual: Tensor  # bool [B, T], all of the prompt's
    valid: Tensor  # bool [B, T], False at padding
    spans: Spans | None  # where each image has a budget of its own
    scores: dict[int, Tensor]  # [B, T], of earlier layers
    keys: dict[int, Tensor]  # [B, KV heads, T, D] after RoPE, of earlier layers
    plain: dict[tuple[int, str], Tensor]  # "q" and "k" [B, T, ..] as projected, before RoPE
    queries: dict[int, tuple[Tensor, float, float | None]]  # after RoPE, scaling, softcap
    parts: dict[tuple[int, str], tuple[Tensor, Tensor]]  # into and out of attention and MLP
    kept_in: dict[int, Tensor]  # bool [B, T], by layer
    schedule: Schedule
    layers: int
    scaling: float = 1.0
    softcap: float | None = None
    query: Tensor = field(default_factory=Tensor)  # [B, H, T, D], after RoPE
    key: Tensor = field(default_factory=Tensor)  # [B, H, T, D], after RoPE; KV heads repeated
    attention: Tensor = field(default_factory=Tensor)  # [B, T], of the last row, mean over heads

    def attention_in(self, layer: int, row: int, position: int) -> Tensor:
        """Softmax attention of a position in an earlier layer, [heads, T]."""
        query, scaling, softcap = self.queries[layer]
        key = self.keys[layer][row].repeat_interleave(
            query.shape[1] // self.keys[layer].shape[1], 0
        )
        logits = torch.einsum("hd,htd->ht", query[row, :, position], key) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        hidden = ~self.kept_in[layer][row]
        hidden = hidden | (torch.arange(len(hidden)) > position)
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)

    @property
    def last(self) -> list[int]:
        return [int(row.nonzero().max()) for row in self.valid]


@dataclass
class Score:
    """What to rank by, in place of the last prompt row's attention: [B, T] of a ``Seen``, taken in
    a layer's attention ("attention"), at a layer's input ("input") or at layer 0's ("embeds")."""

    of: Callable[[Seen], Tensor]
    stage: str = "attention"
    later: Callable[[Seen], Tensor] | None = None  # in each layer's attention, for drops behind it
    above: float | None = None  # the schedule counts, of each group, the tokens that score more


class Schedule(Protocol):
    def kept(self, layer: int, n_visual: int) -> int: ...
    def visible(self, layer: int, n_visual: int, step: int) -> int: ...


@dataclass(frozen=True)
class FakeSchedule:
    """``shares[i] = (layer, share)``: from ``layer`` on, ``share`` of the visual tokens is kept.
    In decode step s a layer shows ``kept * max(floor, 1 - s / tau)`` of them (tau 0: all)."""

    shares: tuple[tuple[int, float], ...] = ()
    tau: int = 0
    floor: float = 0.0

    def kept(self, layer: int, n_visual: int) -> int:
        share = 1.0
        for first, s in self.shares:
            share = s if layer >= first else share
        return int(n_visual * share + 1e-9)

    def visible(self, layer: int, n_visual: int, step: int) -> int:
        kept = self.kept(layer, n_visual)
        return int(kept * max(self.floor, 1 - step / self.tau)) if self.tau else kept


@dataclass
class ReferenceResult:
    """``logits`` [B, T, V]; ``kept[layer]`` and ``scores[layer]`` [B, T]: who was still there in
    the layer, and the last prompt row's attention (or ``score``) measured in it."""

    logits: Tensor
    kept: list[Tensor]
    scores: list[Tensor]
