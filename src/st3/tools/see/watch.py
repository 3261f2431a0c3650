"""Look at the attention of the last token while a model runs, layer by layer, and keep none of it.

A watcher rides on the engine's attention functions: each decoder layer's queries and keys pass by,
the attention of the last row is computed from them and handed to a :class:`Listener`, which reduces
it at once. The layer's own attention function then runs on its own inputs, so that the model's
output is bitwise what it is without a watcher, on a bare model and on a trimmed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from st3.engine.calls import AttentionCall
from st3.engine.events import Observer, PassEvent, PromptEvent, StepEvent
from st3.engine.kv.base import Store
from st3.engine.masks import as_bool
from st3.engine.prompt import Block
from st3.engine.wiring import Wiring
from st3.errors import TrimStateError, UnsupportedModelError
from st3.methods.scores import LayerView
from st3.models import family_of
from st3.trimmer import Trimmer, trim, trimmer_of

ONE_ROW = (
    "a watched model runs one prompt with an image at a time, without padding, beams or copies"
)


@dataclass(frozen=True)
class Prompt:
    """The prompt that is watched.

    Attributes:
        length: its tokens.
        visual: [V] ascending columns of its visual tokens, on the model's device.
    """

    length: int
    visual: Tensor

    @property
    def device(self) -> torch.device:
        return self.visual.device


class Listener(Protocol):
    """Takes what a watcher sees. Step 0 is the prefill, step t the t-th decode step."""

    def prompt(self, prompt: Prompt) -> None:
        """A prompt's prefill starts."""

    def layer(self, layer: int, attention: Tensor, columns: Tensor) -> None:
        """One layer of a pass.

        Args:
            attention: [K] softmax attention of the last token over the keys that the layer sees,
                mean over the query heads, fp32.
            columns: [K] int, each key's place in the untrimmed sequence; the same tensor for all
                layers of a pass that see the same keys.
        """

    def done(self, step: int) -> None:
        """All layers of a pass have been heard."""


class Watch(Observer):
    """Attaches a listener to a model, trimmed or not, for the length of a ``with`` block.

    A layer with a state looks at no token. In its place the listener gets the attention of the
    latest layer that does, before the first of them that of the first; tokens are ranked by that.

    Raises:
        UnsupportedModelError: a model or attention kernel that st3 does not support.
        TrimStateError: on entering, if the model is being watched already or decodes compiled; in
            a pass, if it is not of one unpadded row.
    """

    attends = True

    def __init__(self, model: nn.Module, listener: Listener) -> None:
        self.model = model
        self.listener = listener
        trimmer = trimmer_of(model)
        self.parts = family_of(model).parts(model) if trimmer is None else trimmer.parts
        self.wiring = Wiring(self.parts.sources)
        self._shown = shown_by(self.parts.sources)
        self.count = len(self.parts.layers)
        self.current: Prompt | None = None
        self._stack = ExitStack()
        self._stored: dict[int, Tensor] = {}  # by layer: columns in the cache's order
        self._stores: Mapping[int, Store] = {}
        self._ranges: dict[int, Tensor] = {}
        self._step = 0
        self._listening = False

    # Life cycle -------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        trimmer = trimmer_of(self.model)
        if trimmer is None:
            trimmer = self._stack.enter_context(trim(self.model, "none"))
        check_watchable(trimmer)
        self._stack.enter_context(trimmer.observe(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._stored.clear()
        self._ranges.clear()
        self._stores = {}
        self.current = None

    # What the engine tells --------------------------------------------------------------------

    def prompt(self, event: PromptEvent) -> None:
        rows, block = event.rows, event.block
        if event.past or rows.batch != 1 or rows.tail or block.valid is not None:
            raise TrimStateError(ONE_ROW)
        self.current = Prompt(rows.length, block.visual[0].nonzero().flatten())
        self._stored.clear()
        self._stores = {}
        self._step, self._listening = 0, True
        self.listener.prompt(self.current)

    def step(self, event: StepEvent) -> None:
        if self.current is None:
            return
        if event.rows != 1 or event.tokens != 1:
            raise TrimStateError(ONE_ROW)
        self._stores = event.stores
        self._step, self._listening = event.past - self.current.length + 1, True

    def text_prompt(self) -> None:
        self.current = None

    def written(self, layer: int, columns: Tensor) -> None:
        self._stored[layer] = columns[0]

    @torch.no_grad()
    def attention(self, layer: int, call: AttentionCall, block: Block | None) -> None:
        """Hand the attention of a layer's last row to the listener.

        Args:
            layer: counted from 0.
            call: the queries and keys, and what the attention was called with.
            block: the rows and visual tokens that the layer sees; None in a decode step.
        """
        prompt = self.current
        if not self._listening or prompt is None:
            return
        end = prompt.length + self._step  # of the untrimmed sequence, the new token included
        source = self.wiring.sources[layer]
        store = None if source is None else self._stores.get(source)
        if block is not None and block.index is not None:
            columns = block.index[0]
        elif store is None:
            columns = self._columns(end, call.key)
        else:
            columns = self._stored_columns(store, end, call.key.device)
        valid = self._valid(layer, call.mask, columns, end)
        attention = last_row(layer, call.query, call.key, call.given, valid)
        for shown in self._shown[layer]:
            self.listener.layer(shown, attention, columns)

    def passed(self, event: PassEvent) -> None:
        if self._listening:
            self._listening = False
            self._ranges.clear()
            self.listener.done(self._step)

    # Columns ----------------------------------------------------------------------------------

    def _stored_columns(self, store: Store, end: int, device: torch.device) -> Tensor:
        """The untrimmed sequence's columns of what a trimmed layer's step sees."""
        first = min(store.row_starts(self._step))
        if store.window is not None:  # it may have evicted text since
            return store.positions(first)[0].to(device)
        prompt = self._stored[store.layer]
        appended = torch.arange(end - (store.end - len(prompt)), end, device=device)
        return torch.cat([prompt[first:].to(device), appended])

    def _valid(self, layer: int, mask: Any, columns: Tensor, end: int) -> Tensor | None:
        """[1, K] bool, the keys that the last query sees; None when it sees them all."""
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return as_bool(mask[:, 0, -1, : len(columns)])
        window = self.parts.windows[layer]  # flash attention has no mask but the window itself
        if window is not None and end > window:
            return (columns > end - 1 - window)[None]
        return None

    def _columns(self, end: int, key: Tensor) -> Tensor:
        """The last keys of an untrimmed sequence of ``end`` tokens, once for all layers."""
        first = end - key.shape[2]
        found = self._ranges.get(first)
        if found is None or len(found) != key.shape[2]:
            found = self._ranges[first] = torch.arange(first, end, device=key.device)
        return found

    def stored(self, layer: int) -> Tensor | None:
        """[M] columns of the prompt as the cache of a trimmed layer holds them: its visual tokens
        first, those that annealing drops first standing first. None if the layer is not trimmed, or
        before the first further token."""
        source = self.wiring.sources[layer]
        return self._stored.get(self._heard(layer) if source is None else source)

    def _heard(self, layer: int) -> int:
        """The layer whose attention stands for that of ``layer``."""
        return next(i for i, shown in self._shown.items() if layer in shown)


def shown_by(sources: Sequence[int | None]) -> dict[int, list[int]]:
    """For each layer with attention the layers that it stands for: itself, layers with a state
    behind it, and if it is the first also those before it."""
    shown: dict[int, list[int]] = {}
    waiting: list[int] = []
    for layer, source in enumerate(sources):
        if source is not None:
            shown[layer], waiting = [*waiting, layer], []
        elif shown:
            shown[max(shown)].append(layer)
        else:
            waiting.append(layer)
    return shown


def check_watchable(trimmer: Trimmer) -> None:
    if trimmer.observers(Watch):
        raise TrimStateError("this model is being watched already")
    if trimmer.compile_decode or trimmer.policy.rerank or trimmer.policy.per_head:
        raise TrimStateError(
            "a run that decodes compiled, ranks tokens anew while it decodes, or per head, cannot "
            "be watched: leave out compile_decode, rerank_every, recall_every, dycoke and per_head"
        )


def last_row(
    layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any], valid: Tensor | None
) -> Tensor:
    """Softmax attention of the last query of one row, mean over the heads, [K] fp32.

    Args:
        query: [1, heads, N, size]; key: [1, KV heads, K, size].
        valid: [1, K] bool, the keys that it sees; None when all are.

    Raises:
        UnsupportedModelError: attention with learned sinks, which take a share of their own.
    """
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError("attention with learned sinks cannot be watched")
    columns = query.shape[2]
    view = LayerView.of(
        query,
        key,
        kwargs,
        layer=layer,
        hidden=None,
        visual=torch.zeros(1, columns, dtype=torch.bool, device=key.device),
        ordinal=torch.zeros(1, columns, dtype=torch.long, device=key.device),
        last=torch.tensor([columns - 1], device=key.device),
        key_valid=valid,
    )
    return view.last_row_logits().softmax(dim=-1).mean(dim=1)[0]
