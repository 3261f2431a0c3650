"""What others may watch of a trimmed run: reports, analyses and benchmarks are observers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from st3.engine.calls import AttentionCall, Chunk
    from st3.engine.kv.base import Store
    from st3.engine.kv.timeline import Timeline
    from st3.engine.plan import Budgets
    from st3.engine.prompt import Block, Rows


@dataclass(frozen=True)
class PromptEvent:
    """A prompt with visual tokens is about to run.

    Attributes:
        rows, block: what was read of it.
        budgets: the original visual counts that the schedule's shares are taken of.
        past: logical length of the cache before it.
        n_past: for each row the tokens of earlier turns.
        timeline: of the cache that it goes to; None if nothing of the run is changed.
        lacks_tower: whether the score goes another way, as the vision tower's attention is not
            known.
    """

    rows: Rows
    block: Block
    budgets: Budgets
    chunk: Chunk
    past: int
    n_past: tuple[int, ...]
    timeline: Timeline | None
    lacks_tower: bool = False


@dataclass(frozen=True)
class StepEvent:
    """A pass behind a prompt is about to run: a decode step, candidates, a next turn of text.

    Attributes:
        past: logical length of the cache before it.
        tokens: its columns.
        rows: of the batch.
        stores: the cache's stores, by decoder layer; empty if nothing of the run is changed.
    """

    past: int
    tokens: int
    rows: int
    stores: Mapping[int, Store]


@dataclass(frozen=True)
class PassEvent:
    """A pass is over.

    Attributes:
        prompt: whether it was a prompt's.
        tokens: its columns.
        length: logical length of the cache behind it; 0 without a cache.
        stores: the cache's stores; empty if nothing of the run is changed.
        entry_bytes: gives the bytes of one KV entry in each layer.
    """

    prompt: bool
    tokens: int
    length: int
    stores: Sequence[Store]
    entry_bytes: Callable[[], tuple[int, ...]]


class Observer:
    """Looks in, changes nothing. Subclass it and override what you want to hear of.

    Attributes:
        attends: whether :meth:`attention` is wanted.
    """

    attends = False

    def prompt(self, event: PromptEvent) -> None:
        """A prompt was read."""

    def counted(self, budgets: Budgets) -> None:
        """The prompt's data say of how many visual tokens the schedule's shares are, in each row or
        image."""

    def text_prompt(self) -> None:
        """A prompt without visual tokens starts a new cache."""

    def step(self, event: StepEvent) -> None:
        """A pass behind a prompt is about to run."""

    def attention(self, layer: int, call: AttentionCall, block: Block | None) -> None:
        """A layer's attention is about to run; ``block``: its columns, of a prompt that is
        trimmed."""

    def scored(self, layer: int, score: Tensor) -> None:
        """The visual tokens of a layer were scored, [B, N]; not told of scores that wait until
        the prompt is written."""

    def kept(self, layer: int, block: Block) -> None:
        """Tokens were dropped before ``layer``; ``block``: the columns left."""

    def written(self, layer: int, columns: Tensor) -> None:
        """A layer's prompt was written to the cache: original columns in the cache's order,
        [B, width], or [B, KV heads, width] where each head has its own, right-aligned."""

    def passed(self, event: PassEvent) -> None:
        """A pass is over."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """A context to put around a part of the engine's work: ``begin``, ``gather``, ``score``,
        ``choose``, ``model`` (the model's own attention), ``finish``, ``write``, ``grow``."""
        return nullcontext()


_NOTHING = nullcontext()


class Events(Observer):
    """Tells all observers."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self._spanning: list[Observer] = []

    def add(self, observer: Observer) -> None:
        """Tell this one, too."""
        self.observers.append(observer)
        self._changed()

    def remove(self, observer: Observer) -> None:
        """Tell this one no longer."""
        self.observers.remove(observer)
        self._changed()

    def _changed(self) -> None:
        self.attends = any(observer.attends for observer in self.observers)
        self._spanning = [o for o in self.observers if type(o).span is not Observer.span]

    def prompt(self, event: PromptEvent) -> None:
        for observer in self.observers:
            observer.prompt(event)

    def counted(self, budgets: Budgets) -> None:
        for observer in self.observers:
            observer.counted(budgets)

    def text_prompt(self) -> None:
        for observer in self.observers:
            observer.text_prompt()

    def step(self, event: StepEvent) -> None:
        for observer in self.observers:
            observer.step(event)

    def attention(self, layer: int, call: AttentionCall, block: Block | None) -> None:
        for observer in self.observers:
            if observer.attends:
                observer.attention(layer, call, block)

    def scored(self, layer: int, score: Tensor) -> None:
        for observer in self.observers:
            observer.scored(layer, score)

    def kept(self, layer: int, block: Block) -> None:
        for observer in self.observers:
            observer.kept(layer, block)

    def written(self, layer: int, columns: Tensor) -> None:
        for observer in self.observers:
            observer.written(layer, columns)

    def passed(self, event: PassEvent) -> None:
        for observer in self.observers:
            observer.passed(event)

    def span(self, name: str) -> AbstractContextManager[object]:
        return self._spans(name) if self._spanning else _NOTHING

    @contextmanager
    def _spans(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self._spanning:
                stack.enter_context(observer.span(name))
            yield
