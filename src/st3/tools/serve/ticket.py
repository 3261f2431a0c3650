"""A request on its way through the engine, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from st3.engine.kv.joined import JoinedSequence
from st3.tools.serve.budget import Columns
from st3.tools.serve.errors import ServeError
from st3.tools.serve.kept import Spots
from st3.tools.serve.sampling import Sampler, Sampling
from st3.tools.serve.text import TextStream


@dataclass(frozen=True)
class Request:
    """A prompt made ready by :meth:`Engine.prepare`.

    Attributes:
        inputs: of the model, one row, on the CPU.
        policy: as :func:`st3.methods.policies.parse` reads it.
        prompt_tokens, visual_tokens: of the prompt, untrimmed; the first includes the second.
        max_tokens: of the answer.
        stop: strings that end it.
        timeout: seconds from its submission to its end, or None.
        columns: the KV columns that it needs in each layer, at most.
        spots: where its visual tokens lie, if its client wants to know what was kept.
    """

    inputs: Mapping[str, Any]
    policy: str
    prompt_tokens: int
    visual_tokens: int
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    timeout: float | None
    columns: Columns
    spots: Spots | None = None

    @property
    def nbytes(self) -> int:
        """Of the inputs."""
        return sum(getattr(value, "nbytes", 0) for value in self.inputs.values())


@dataclass(frozen=True)
class Delta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Kept:
    """The prompt has run, and its client wants to know what was kept; see
    :func:`~st3.tools.serve.kept.kept_of`."""

    what: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        reason: ``stop`` (the model's end token or a stop string) or ``length``.
        token_ids: the tokens generated, the end token included.
        visual_tokens: of the prompt, as the model saw them.
        mean_share: share of them that entered a decoder layer, mean over the layers.
        kv_bytes: what its KV entries took at most, by the admission's account.
        queued, ttft, total: seconds from submission to the prefill, the first token, the end.
    """

    reason: Literal["stop", "length"]
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    visual_tokens: int
    mean_share: float
    policy: str
    kv_bytes: int
    queued: float
    ttft: float
    total: float


@dataclass(frozen=True)
class Failed:
    """There will be no (further) answer."""

    error: ServeError


Event = Delta | Kept | Finished | Failed
Listener = Callable[[Event], None]


class Ticket:
    """A submitted request. The engine's thread alone changes it, but for :meth:`cancel`."""

    def __init__(self, request: Request, listener: Listener) -> None:
        self.request = request
        self.cancelled = False
        self.ended = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first: float | None = None
        self.tokens: list[int] = []
        self.columns = request.columns
        self.visual = request.visual_tokens
        self.row: JoinedSequence | None = None
        self.sampler: Sampler | None = None
        self.text: TextStream | None = None
        self._listener = listener

    def cancel(self) -> None:
        """Nobody waits for the answer any more: its row is freed before the next step."""
        self.cancelled = True

    def late(self, now: float) -> bool:
        timeout = self.request.timeout
        return timeout is not None and now - self.submitted > timeout

    def tell(self, event: Event) -> None:
        """Pass an event on; who does not listen any more cancels."""
        if self.ended:
            return
        if isinstance(event, Finished | Failed):
            self.ended = True
        try:
            self._listener(event)
        except Exception:  # its event loop is closed, say; the engine must live on
            self.cancelled = True

    def fail(self, error: ServeError) -> None:
        self.tell(Failed(error))

    def take(self, token: int, ends: frozenset[int]) -> str | None:
        """The next token. Returns why the answer ends with it, or None."""
        text = self.text
        if text is None:
            raise RuntimeError("a ticket takes tokens only behind its prefill")
        if self.first is None:
            self.first = time.monotonic()
        self.tokens.append(token)
        piece = text.push(token)
        if piece:
            self.tell(Delta(piece))
        if token in ends or text.stopped:
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_tokens else None

    def finish(self, reason: str, kv_bytes: int) -> None:
        """Give out the rest, and the summary."""
        text, row = self.text, self.row
        if text is None or row is None:
            raise RuntimeError("a ticket finishes only behind its prefill")
        rest = text.close()
        if rest:
            self.tell(Delta(rest))
        now = time.monotonic()
        self.tell(
            Finished(
                reason="stop" if reason == "stop" or text.stopped else "length",
                text=text.text,
                token_ids=tuple(self.tokens),
                prompt_tokens=row.prompt,
                visual_tokens=self.visual,
                mean_share=_mean_share(row, self.visual),
                policy=self.request.policy,
                kv_bytes=kv_bytes,
                queued=(self.started or now) - self.submitted,
                ttft=(self.first or now) - self.submitted,
                total=now - self.submitted,
            )
        )


def _mean_share(row: JoinedSequence, visual: int) -> float:
    kept = row.counts.at(0)
    return sum(kept) / (len(kept) * visual) if visual else 1.0
