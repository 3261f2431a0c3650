"""FLOPs of a prefill and of a decode step. One multiply-add is two FLOPs.

Only matrix products and convolutions are counted: projections, attention scores and values, the
rule of a state as it runs in chunks (also for a decode step, whose own form is cheaper), MLP and
head. Norms, activations, softmax, rotary embeddings and the choice of tokens are not (together they
are far below 1 % on the models of interest).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .dims import LayerDims, TextDims

Attention = Literal["useful", "full"]
"""What of the attention matrix counts: the pairs that the mask allows (causal: one half), or all
pairs, as a kernel with a dense mask computes them and torch's FlopCounterMode counts them."""


class Schedule(Protocol):
    """What the cost model asks of a schedule; ``st3.methods.schedule.Schedule`` is one."""

    @property
    def num_layers(self) -> int: ...

    def kept(self, layer: int, n_visual: int) -> int: ...

    def visible(self, layer: int, n_visual: int, step: int) -> int: ...


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one decoder layer."""

    projections: int  # query, key, value and output; in layers with a state all that makes it
    scores: int  # attention scores and the weighted sum of values
    mlp: int

    @property
    def total(self) -> int:
        return self.projections + self.scores + self.mlp


@dataclass(frozen=True)
class PrefillFlops:
    """FLOPs of one prompt's prefill in the text decoder; the vision tower is apart
    (:func:`st3.cost.vision_flops`), because trimming inside the decoder does not change it."""

    layers: tuple[LayerFlops, ...]
    lm_head: int  # of one position, as generate() computes it
    inputs: int = 0  # before the first layer (Gemma 4 only)

    @property
    def total(self) -> int:
        return self.inputs + sum(layer.total for layer in self.layers) + self.lm_head


def prefill_flops(
    dims: TextDims,
    n_text: int,
    n_visual: int,
    schedule: Schedule | None = None,
    *,
    attention: Attention = "useful",
    images: int = 1,
) -> PrefillFlops:
    """FLOPs of the prefill of a prompt of ``n_text + n_visual`` tokens.

    Layer ``l`` computes on ``n_text + schedule.kept(l, n_visual)`` tokens; ``schedule=None`` is
    the untrimmed model.

    Args:
        dims: of the text decoder.
        n_text, n_visual: tokens of the prompt.
        schedule: of as many decoder layers; None: the untrimmed model.
        attention: "useful" counts the pairs that the mask allows, "full" all of them.
        images: matters only where the tokens of an image see each other both ways (Gemma 3): they
            are taken to be of equal size.

    Returns:
        FLOPs (two for a multiply-add) of each layer, of the head for one position, of the inputs.

    Raises:
        ValueError: negative counts, or a schedule of another number of layers.
    """
    check(dims, n_text, n_visual, schedule)
    layers = []
    for index, layer in enumerate(dims.layers):
        kept = n_visual if schedule is None else schedule.kept(index, n_visual)
        tokens = 1 if layer.last_only else n_text + kept
        if layer.source is not None:
            of = n_visual if schedule is None else schedule.kept(layer.source, n_visual)
            pairs = _read_pairs(layer, tokens, n_text + of, attention)
        elif attention == "full":
            pairs = tokens**2
        else:
            pairs = useful_pairs(layer, n_text, kept, images)
        layers.append(
            LayerFlops(
                projections=tokens * (2 * layer.projections + layer.mixing),
                scores=layer.pair * pairs,
                mlp=2 * tokens * layer.mlp,
            )
        )
    return PrefillFlops(
        layers=tuple(layers),
        lm_head=2 * dims.lm_head,
        inputs=2 * (n_text + n_visual) * dims.inputs,
    )


def decode_flops(
    dims: TextDims, n_text: int, n_visual: int, schedule: Schedule | None = None, step: int = 1
) -> int:
    """FLOPs of one decode step of one sequence, the head included.

    Args:
        dims, n_text, n_visual, schedule: as for :func:`prefill_flops`.
        step: 1 is the first: it feeds back the first generated token and attends to the prompt's
            live entries and itself.

    Raises:
        ValueError: negative counts, a schedule of another number of layers, or a step below 1.
    """
    check(dims, n_text, n_visual, schedule)
    total = 2 * (dims.inputs + dims.lm_head)
    for layer, keys in zip(dims.layers, read(dims, n_text, n_visual, schedule, step), strict=True):
        total += 2 * (layer.projections + layer.mlp) + layer.mixing + layer.pair * keys
    return total


def read(
    dims: TextDims, n_text: int, n_visual: int, schedule: Schedule | None, step: int
) -> list[int]:
    """KV entries that each layer's attention reads at decode step ``step``, the new one included.

    A sliding layer reads at most its window; which of the entries in the window were dropped
    depends on the image, so that the window is taken over the live entries: an upper bound.
    """
    if step < 1:
        raise ValueError(f"decode steps are counted from 1, got {step} (0 is the prefill)")
    live = []
    for index, layer in enumerate(dims.layers):
        shown = index if layer.source is None else layer.source
        visible = n_visual if schedule is None else schedule.visible(shown, n_visual, step)
        entries = n_text + visible + step
        live.append(entries if layer.window is None else min(entries, layer.window))
    return live


def _read_pairs(layer: LayerDims, queries: int, keys: int, attention: Attention) -> int:
    """Pairs of a layer that reads another one's entries; its queries are taken to be the last of
    those tokens, which text before an image is not: an upper bound."""
    if attention == "full":
        return queries * keys
    window = keys if layer.window is None else layer.window
    return sum(min(window, keys - queries + place) for place in range(1, queries + 1))


def useful_pairs(layer: LayerDims, n_text: int, n_visual: int, images: int = 1) -> int:
    """(query, key) pairs that the prefill mask of ``layer`` allows among ``n_text + n_visual``
    tokens, the visual ones in ``images`` runs of equal size."""
    tokens = n_text + n_visual
    if layer.lookahead == "prompt":  # also in layers with a window
        return tokens**2
    window = tokens if layer.window is None else min(layer.window, tokens)
    pairs = window * (window + 1) // 2 + (tokens - window) * window
    if layer.lookahead == "none":
        return pairs
    runs = images if layer.lookahead == "image" else 1
    size, rest = divmod(n_visual, runs)
    ahead = [size + (run < rest) for run in range(runs)]
    return pairs + sum(n * (n - 1) // 2 for n in ahead)


def check(dims: TextDims, n_text: int, n_visual: int, schedule: Schedule | None) -> None:
    """Raise ValueError for counts and schedules that cannot belong to ``dims``."""
    if n_text < 0 or n_visual < 0:
        raise ValueError(f"token counts cannot be negative: n_text={n_text}, n_visual={n_visual}")
    if schedule is not None and schedule.num_layers != dims.num_layers:
        raise ValueError(
            f"the schedule is for {schedule.num_layers} decoder layers, the model has "
            f"{dims.num_layers}: make it with policy.schedule({dims.num_layers})"
        )
