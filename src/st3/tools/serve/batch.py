"""Prompts prefilled one by one, and the running batch that they join and leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st3.engine.kv.joined import (
    JoinedSequence,
    JoinedStore,
    SequenceEntries,
    entries_of,
    plain_entries,
    visible_counts,
)
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Timeline
from st3.hf.cache import stores_of
from st3.hf.call import CACHE, cache_of
from st3.hf.joined import JoinedCache
from st3.hf.states import RowState, has_state, joined, place, row_of, state_bytes
from st3.tools.serve.kept import Spots, kept_of, nothing
from st3.trimmer import Trimmer

Held = SequenceEntries | RowState
"""What one sequence holds in one decoder layer."""


@dataclass
class Prefilled:
    """A prompt that has run through the model.

    Attributes:
        sequence: its own time.
        entries: its KV entries, or its state, by layer; taken out one by one when it joins a batch.
        logits: of its first token, [V] float32.
        visual: its visual tokens.
        kept: what each layer saw of them, if that was asked for.
    """

    sequence: JoinedSequence
    entries: list[Held | None]
    logits: Tensor
    visual: int
    kept: dict[str, Any] | None = None


def prefill(
    model: Any, inputs: Mapping[str, Any], trimmer: Trimmer, spots: Spots | None = None
) -> Prefilled:
    """Run one prompt under an attached trimmer, exactly as generate() does.

    Args:
        inputs: what the processor made of one conversation, batch size 1, on the model's device.
        spots: where its visual tokens lie, if what is kept of them shall be told.
    """
    positions: list[Any] = []

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions.append(kwargs.get("position_ids"))

    hook = trimmer.parts.text.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=1,
            min_new_tokens=0,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        hook.remove()
    cache = cache_of(out)
    prompt = int(cache.get_seq_length())
    stores = stores_of(cache)
    budgets = next(iter(stores.values())).rows[0].budgets if stores else ()
    sequence = JoinedSequence(
        counts=visible_counts(trimmer.schedule, budgets),
        prompt=prompt,
        position=_next_position(positions[0], prompt),
        rerank=trimmer.policy.rerank if budgets else None,
    )
    entries: list[Held | None] = []
    sources = trimmer.wiring.sources
    for index, window in enumerate(trimmer.parts.windows[: len(cache.layers)]):
        store, layer = stores.get(index), cache.layers[index]
        if isinstance(store, KVStore):
            entries.append(entries_of(store))
        elif sources[index] != index:  # a state, a stand-in, or nothing
            entries.append(RowState(layer))
        else:
            entries.append(plain_entries(layer.keys, layer.values, prompt, window))
    kept = None
    if spots is not None:
        layers = trimmer.schedule.num_layers
        kept = kept_of(spots, trimmer.report) if budgets else nothing(layers)
    visual = sum(trimmer.report.n_visual) if budgets else 0
    return Prefilled(sequence, entries, out.logits[0][0].float(), visual, kept)


def _next_position(prompt_positions: Tensor | None, prompt: int) -> tuple[int, ...]:
    """The position of the first generated token, one number per dimension of the RoPE."""
    if prompt_positions is None:
        return (prompt,)
    last = prompt_positions[..., -1].flatten()  # of the generation prompt, which is text
    return tuple(int(place) + 1 for place in last.tolist())


class JoinedBatch:
    """The rows that decode together. ``rows`` holds them in the order of the logits."""

    def __init__(self, model: Any, windows: Sequence[int | None]) -> None:
        self.model = model
        self.windows = tuple(windows)
        self.rows: list[JoinedSequence] = []
        self.cache = JoinedCache()

    @property
    def layers(self) -> list[JoinedStore]:
        """The stores of the decoder layers that have KV entries of their own."""
        return [held for held in self.cache.held if isinstance(held, JoinedStore)]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the batch's KV buffers and states."""
        states = sum(map(state_bytes, self.cache.held))
        return states + sum(layer.allocated_bytes for layer in self.layers)

    def change(
        self, leaving: set[int], new: Sequence[Prefilled], limits: Sequence[int] | None = None
    ) -> None:
        """Let rows leave, by their index, and others join.

        Args:
            limits: columns that each layer's buffer may at most have; None: any number.
        """
        if not leaving and not new:
            return
        if len(leaving) == len(new) and self._has_room(new, limits):
            self._exchange(sorted(leaving), new)
        else:
            self._rebuild(leaving, new)

    def _has_room(self, new: Sequence[Prefilled], limits: Sequence[int] | None) -> bool:
        for layer in self.layers:
            if limits is not None and layer.capacity > limits[layer.layer]:
                return False
            for prompt in new:
                one = prompt.entries[layer.layer]
                if not isinstance(one, SequenceEntries) or one.columns > layer.width:
                    return False
        return True

    def _exchange(self, places: Sequence[int], new: Sequence[Prefilled]) -> None:
        """Newcomers take the places of those who leave: no other row is copied."""
        for row, prompt in zip(places, new, strict=True):
            self.rows[row] = prompt.sequence
        for index, held in enumerate(self.cache.held):
            for row, prompt in zip(places, new, strict=True):
                one = _take(prompt, index)
                if isinstance(one, SequenceEntries):
                    held.place(row, one)
                else:
                    place(held, row, one)
            if isinstance(held, JoinedStore):
                held.synchronise()

    def _rebuild(self, leaving: set[int], new: Sequence[Prefilled]) -> None:
        """Copy who stays and who comes into fresh buffers, one layer at a time; what annealing
        released is left behind."""
        stay = [index for index in range(len(self.rows)) if index not in leaving]
        rows = [self.rows[index] for index in stay] + [prompt.sequence for prompt in new]
        timeline = Timeline()
        before = self.cache.held
        self.cache.clear()
        count = len(before) if before else len(new[0].entries) if new else 0
        for index in range(count if rows else 0):
            held: list[Held] = [_row(before[index], row) for row in stay]
            held += [_take(prompt, index) for prompt in new]
            entries = [one for one in held if isinstance(one, SequenceEntries)]
            if entries:
                fresh = JoinedStore(index, rows, timeline, self.windows[index])
                fresh.fill(entries)
                self.cache.add(fresh)
            else:
                self.cache.add(joined([one for one in held if isinstance(one, RowState)]))
            del held, entries
            if before and isinstance(before[index], JoinedStore):
                before[index].reset()
        self.rows = rows

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed each row its latest token.

        Returns:
            the logits of the next ones, [rows, V] float32.
        """
        device = self.model.device
        output = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=self._positions().to(device),
            **{CACHE: self.cache},
            use_cache=True,
        )
        for row in self.rows:
            row.steps += 1
            row.position = tuple(place + 1 for place in row.position)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _positions(self) -> Tensor:
        """[rows, 1], or [dimensions, rows, 1] with a multimodal RoPE."""
        size = max(len(row.position) for row in self.rows)
        # A prompt without an image may have one dimension only: there all of them are equal.
        table = [row.position if len(row.position) == size else row.position[:1] * size
                 for row in self.rows]  # fmt: skip
        positions = torch.tensor(table)
        return positions if size == 1 else positions.T[..., None]


def _row(held: Any, row: int) -> Held:
    """What a row holds in a layer of a batch."""
    if isinstance(held, JoinedStore):
        return held.entries(row)
    return row_of(held, row) if has_state(held) else RowState(held)


def _take(prompt: Prefilled, layer: int) -> Held:
    """A layer's entries, which the prompt then lets go of."""
    entries, prompt.entries[layer] = prompt.entries[layer], None
    if entries is None:
        raise RuntimeError("this prompt has joined a batch already")
    return entries
