"""The engine: a thread that prefills waiting requests and decodes all running ones together."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from st3.bench.memory import available_bytes
from st3.engine import Trimmer, UnsupportedModelError
from st3.engine.rows import visible_counts
from st3.policies import parse
from st3.serve.batch import JoinedBatch, Prefilled, prefill
from st3.serve.budget import Budget, columns_at_peak, entry_bytes, widest
from st3.serve.errors import ServeError, overloaded, refused, unavailable
from st3.serve.prompt import Prompts
from st3.serve.sampling import Sampler, Sampling, check_generation_config
from st3.serve.text import TextStream
from st3.serve.ticket import Event, Failed, Finished, Listener, Request, Ticket

log = logging.getLogger("st3.serve")


@dataclass(frozen=True)
class Stats:
    """A moment of the engine. Bytes are of KV entries.

    Attributes:
        running, waiting: requests that decode; that are queued.
        lanes: batches that decode, one after another.
        reserved: bytes promised to the running requests; never above ``budget``.
        allocated: bytes of the batches' buffers now.
        most_running: the most that ran at once so far.
        steps, tokens: decode steps of batches and tokens generated so far.
    """

    running: int
    waiting: int
    lanes: int
    budget: int
    reserved: int
    allocated: int
    most_running: int
    steps: int
    tokens: int


class Lane:
    """A batch and the tickets of its rows."""

    def __init__(self, batch: JoinedBatch) -> None:
        self.batch = batch
        self.tickets: list[Ticket] = []
        self.leaving: set[int] = set()
        self.new: list[tuple[Ticket, Prefilled]] = []

    def columns(self) -> list[tuple[int, ...]]:
        """What those who stay and those who come need."""
        stay = [t.columns for i, t in enumerate(self.tickets) if i not in self.leaving]
        return stay + [ticket.columns for ticket, _ in self.new]

    def change(self) -> None:
        """Carry out who leaves and who joins."""
        if not self.leaving and not self.new:
            return
        new = [prompt for _, prompt in self.new]
        by_row = {id(ticket.row): ticket for ticket in self.tickets}
        by_row.update((id(ticket.row), ticket) for ticket, _ in self.new)
        left = self.columns()
        self.batch.change(self.leaving, new, widest(left) if left else None)
        self.tickets = [by_row[id(row)] for row in self.batch.rows]
        self.leaving, self.new = set(), []


class Engine:
    """Answers requests with one model, many at once, within a budget of KV bytes.

    Requests are admitted in the order of their arrival, as soon as what they will hold at most
    (their policy's visible tokens, their text, their longest answer) fits into the budget. Each
    is prefilled alone, joins a running batch, and leaves it when it is done.

    Args:
        model, processor: as ``AutoModelForImageTextToText`` and ``AutoProcessor`` load them. While
            the engine is busy it has a trimmer attached: use the model for nothing else meanwhile.
        policy: of requests that name none.
        kv_budget_bytes: for KV entries; None: half of what the device has free now. A prompt's
            activations, and the entries of those being prefilled, come on top.
        queue_limit: requests that may wait.
        max_rows: requests that may run at once, whatever the budget.
        max_prefills_per_step: prompts taken in between two decode steps; more fill the batch
            sooner and hold up the running answers for longer.
        max_prompt_tokens: of a prompt, untrimmed; None: as many as the model has positions.
        slack: share of its own bytes that a request may cost in padding before it gets a batch of
            its own shape.

    Raises:
        UnsupportedModelError: a model that cannot be trimmed.
        ValueError: a policy or argument that does not fit.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        policy: str = "st3",
        kv_budget_bytes: int | None = None,
        *,
        queue_limit: int = 64,
        max_rows: int = 256,
        max_prefills_per_step: int = 4,
        max_prompt_tokens: int | None = None,
        slack: float = 0.25,
    ) -> None:
        if queue_limit < 1 or max_rows < 1 or max_prefills_per_step < 1:
            raise ValueError("queue_limit, max_rows and max_prefills_per_step must be at least 1")
        config = getattr(model, "generation_config", None)
        check_generation_config(config)
        self.model, self.processor = model, processor
        self.policy = str(parse(policy))
        self.queue_limit, self.max_rows = queue_limit, max_rows
        self.max_prefills = max_prefills_per_step
        # Also the trimmer of untrimmed requests: st3's cache, nothing dropped.
        self._decoder = Trimmer(model, "none", own_cache=True)
        self._trimmers: OrderedDict[str, Trimmer] = OrderedDict()
        self._trimmers_lock = threading.Lock()
        self.trimmer(self.policy)
        if kv_budget_bytes is None:
            free = available_bytes(model.device)
            if free is None:
                raise ValueError(f"free memory of {model.device} is unknown: set kv_budget_bytes")
            kv_budget_bytes = free // 2
        entries = entry_bytes(model, self._decoder.schedule.num_layers)
        if kv_budget_bytes < sum(entries):
            raise ValueError(f"a KV budget of {kv_budget_bytes} bytes does not hold one token")
        self.budget = Budget(kv_budget_bytes, entries, slack)
        self.prompts = Prompts(model, processor, max_prompt_tokens)
        self._tokenizer = copy.deepcopy(processor.tokenizer)  # the engine's thread has its own
        self._ends = _end_tokens(config)
        self._waiting: deque[Ticket] = deque()
        self._lanes: list[Lane] = []
        self._wake = threading.Condition()
        self._accepts, self._stopping = True, False
        self._most_running = self._steps = self._tokens = 0
        self._thread = threading.Thread(target=self._run, name="st3-engine", daemon=True)
        self._thread.start()

    # What callers use ---------------------------------------------------------------------------

    def trimmer(self, policy: str) -> Trimmer:
        """The trimmer of a policy. Raises ValueError for one that does not fit this model."""
        name = str(parse(policy))
        with self._trimmers_lock:
            found = self._trimmers.pop(name, None)
            if found is None:
                found = Trimmer(self.model, name)
                if found.policy.recalls:
                    raise ValueError(
                        "it shows hidden tokens again, which a server gives up: use a policy that "
                        "recalls nothing, such as st3 with rerank_every"
                    )
                found = found if found.touches else self._decoder
            self._trimmers[name] = found
            while len(self._trimmers) > 32:
                self._trimmers.popitem(last=False)
            return found

    def prepare(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        policy: str | None = None,
        max_tokens: int = 256,
        shorten: bool = False,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Request:
        """Make a conversation ready: chat template, tokens, pixels, and what it will need.

        Args:
            messages: turns with ``role`` and ``content``, a list of ``{"type": "text", "text"}``
                and ``{"type": "image", "image": PIL image}``.
            shorten: whether ``max_tokens`` may be less, so that it fits the model's positions.

        Raises:
            ServeError: for a conversation that this model or this budget can never answer.
        """
        name = self.policy if policy is None else policy
        try:
            name = str(parse(name))
            trimmer = self.trimmer(name)
        except (ValueError, TypeError) as error:
            raise refused(f"policy {name!r}: {error}", "st3.policy") from error
        inputs, tokens, visual = self.prompts.tokenise(messages)
        max_tokens = self.prompts.room(tokens, max_tokens) if shorten else max_tokens
        self.prompts.check_length(tokens, max_tokens)
        counts = visible_counts(trimmer.schedule, (visual,) if visual else ())
        columns = columns_at_peak(counts, tokens - visual, max_tokens)
        needed = self.budget.bytes([columns])
        if needed > self.budget.total:
            raise refused(
                f"this request needs up to {needed} bytes of KV cache ({tokens} prompt tokens, "
                f"{visual} of them visual, policy {name}, max_tokens {max_tokens}); the server has "
                f"{self.budget.total}. Ask for fewer tokens, send fewer or smaller images, or "
                "choose a policy that drops more",
                code="kv_budget_exceeded",
            )
        return Request(
            inputs, name, tokens, visual, max_tokens, sampling or Sampling(), tuple(stop), timeout,
            columns,
        )  # fmt: skip

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queue a request. ``listener`` gets its events, from the engine's thread: text deltas,
        then one :class:`Finished` or :class:`Failed`.

        Raises:
            ServeError: 429 when the queue is full, 503 when the engine is closing.
        """
        ticket = Ticket(request, listener)
        with self._wake:
            if not self._accepts:
                raise unavailable()
            if len(self._waiting) >= self.queue_limit:
                raise overloaded(
                    f"{self.queue_limit} requests are waiting already: try again later",
                    self._retry_after(),
                )
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def complete(self, request: Request) -> Finished:
        """Submit and wait. Raises ServeError if it gets no answer."""
        events: SimpleQueue[Event] = SimpleQueue()
        self.submit(request, events.put)
        while True:
            event = events.get()
            if isinstance(event, Finished):
                return event
            if isinstance(event, Failed):
                raise event.error

    @property
    def full(self) -> bool:
        """Whether the next request would be refused for want of room in the queue."""
        return len(self._waiting) >= self.queue_limit

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._accepts

    def stats(self) -> Stats:
        with self._wake:
            lanes = list(self._lanes)
            return Stats(
                running=sum(len(lane.columns()) for lane in lanes),
                waiting=len(self._waiting),
                lanes=len(lanes),
                budget=self.budget.total,
                reserved=sum(self.budget.bytes(lane.columns()) for lane in lanes),
                allocated=sum(lane.batch.allocated_bytes for lane in lanes),
                most_running=self._most_running,
                steps=self._steps,
                tokens=self._tokens,
            )

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, finish the accepted ones, and stop. Behind ``timeout`` seconds
        those still there are failed.

        Returns:
            whether all were finished.
        """
        with self._wake:
            self._accepts = False
            self._wake.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        return False

    def _retry_after(self) -> int:
        """Seconds, from how many wait; a hint."""
        return max(1, min(60, len(self._waiting) // 8))

    # The engine's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:  # the trimmer cannot be attached, say: nothing can be answered any more
            log.exception("the engine has stopped")
            self._accepts = False
            self._give_up(ServeError(500, "internal_error", "the engine has stopped"))

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or not self._accepts)
                if not self._waiting:
                    return
            with torch.no_grad(), self._decoder:
                while self._waiting or self._lanes:
                    try:
                        self._turn()
                    except Exception:
                        log.exception("the engine failed; its requests are given up")
                        self._give_up(ServeError(500, "internal_error", "the engine failed"))

    def _turn(self) -> None:
        """One round: who left, who comes, one step of each lane."""
        if self._stopping:
            self._give_up(unavailable("the server was shut down before this answer was complete"))
        self._drop_the_gone()
        newcomers = self._admit()
        for ticket, lane in newcomers:
            self._start(ticket, lane)
        for lane in list(self._lanes):
            self._step(lane)
        with self._wake:
            self._lanes = [lane for lane in self._lanes if lane.columns()]

    def _give_up(self, error: ServeError) -> None:
        with self._wake:
            tickets = list(self._waiting)
            self._waiting.clear()
            for lane in self._lanes:
                tickets += [*lane.tickets, *(ticket for ticket, _ in lane.new)]
            self._lanes = []
        for ticket in tickets:
            ticket.fail(error)

    def _drop_the_gone(self) -> None:
        """Free what nobody waits for any more, and what took too long."""
        now = time.monotonic()
        with self._wake:
            gone = [t for t in self._waiting if t.cancelled or t.late(now)]
            for ticket in gone:
                self._waiting.remove(ticket)
            for lane in self._lanes:
                for place, ticket in enumerate(lane.tickets):
                    if (ticket.cancelled or ticket.late(now)) and place not in lane.leaving:
                        lane.leaving.add(place)
                        gone.append(ticket)
        for ticket in gone:
            limit = ticket.request.timeout
            message = f"not answered within {limit:g} seconds" if limit else "cancelled"
            ticket.fail(ServeError(504, "timeout", message))

    def _admit(self) -> list[tuple[Ticket, Lane]]:
        """Take from the queue what the budget holds, first come, first served."""
        admitted: list[tuple[Ticket, Lane]] = []
        with self._wake:
            lanes = [lane.columns() for lane in self._lanes]
            while self._waiting and len(admitted) < self.max_prefills:
                ticket = self._waiting[0]
                place = self.budget.place(lanes, ticket.columns, self.max_rows)
                if place is None:
                    break
                self._waiting.popleft()
                if place == len(lanes):
                    batch = JoinedBatch(self.model, self._decoder.parts.windows)
                    self._lanes.append(Lane(batch))
                    lanes.append([])
                lanes[place].append(ticket.columns)
                admitted.append((ticket, self._lanes[place]))
        return admitted

    def _start(self, ticket: Ticket, lane: Lane) -> None:
        """Prefill, and give out the first token."""
        ticket.started = time.monotonic()
        request = ticket.request
        try:
            prompt = self._prefill(request)
            self._open(ticket, prompt)
            token = self._choose(ticket, prompt.logits)
        except torch.OutOfMemoryError as error:
            log.warning("out of memory in a prefill: %s", error)
            ticket.fail(ServeError(503, "out_of_memory", "no memory for this prompt: try again"))
            return
        except (UnsupportedModelError, ValueError, IndexError) as error:
            ticket.fail(refused(f"the model cannot run this prompt: {error}"))
            return
        except Exception:
            log.exception("a prefill failed")
            ticket.fail(ServeError(500, "internal_error", "the model failed on this prompt"))
            return
        if not self._took(ticket, token):
            lane.new.append((ticket, prompt))

    def _open(self, ticket: Ticket, prompt: Prefilled) -> None:
        """What a ticket needs to take tokens."""
        request, row = ticket.request, prompt.row
        ticket.row, ticket.visual = row, prompt.visual
        ids = request.inputs["input_ids"][0].tolist()
        ticket.sampler = Sampler(request.sampling, self.model.generation_config, ids)
        ticket.text = TextStream(self._tokenizer, request.stop)
        text = row.prompt - prompt.visual
        ticket.columns = columns_at_peak(row.counts, text, request.max_tokens)

    def _choose(self, ticket: Ticket, logits: torch.Tensor) -> int:
        """The next token, of its logits [V]."""
        if ticket.sampler is None:
            raise RuntimeError("a ticket samples only behind its prefill")
        return ticket.sampler.choose(logits)

    def _prefill(self, request: Request) -> Prefilled:
        inputs = {
            name: value.to(
                self.model.device,
                dtype=self.model.dtype if value.is_floating_point() else None,
            )
            if isinstance(value, torch.Tensor)
            else value
            for name, value in request.inputs.items()
        }
        trimmer = self.trimmer(request.policy)
        try:
            if trimmer is self._decoder:
                return prefill(self.model, inputs, trimmer)
            with trimmer:
                return prefill(self.model, inputs, trimmer)
        except Exception:
            self._decoder.detach()  # forget what the hooks noted of this prompt
            self._decoder.attach()
            raise

    def _took(self, ticket: Ticket, token: int) -> bool:
        """Give a ticket its next token; whether it is done with it."""
        self._tokens += 1
        reason = ticket.take(token, self._ends)
        if reason is not None:
            ticket.finish(reason, self.budget.bytes([ticket.columns]))
        return reason is not None

    def _step(self, lane: Lane) -> None:
        try:
            lane.change()
            if not lane.tickets:
                return
            with self._wake:
                running = sum(len(other.columns()) for other in self._lanes)
                self._most_running = max(self._most_running, running)
            logits = lane.batch.step([ticket.tokens[-1] for ticket in lane.tickets])
            best = logits.argmax(dim=-1).tolist()
        except Exception as error:
            log.exception("a decode step failed; the requests of its batch are given up")
            memory = isinstance(error, torch.OutOfMemoryError)
            reason = "there was no memory for" if memory else "the model failed in"
            for ticket in [*lane.tickets, *(ticket for ticket, _ in lane.new)]:
                ticket.fail(ServeError(500, "internal_error", f"{reason} a decode step"))
            lane.tickets, lane.leaving, lane.new = [], set(), []
            lane.batch = JoinedBatch(self.model, self._decoder.parts.windows)
            return
        self._steps += 1
        for place, (ticket, token) in enumerate(zip(lane.tickets, best, strict=True)):
            try:
                plain = ticket.sampler is not None and ticket.sampler.plain
                done = self._took(ticket, token if plain else self._choose(ticket, logits[place]))
            except Exception:  # logits that are not finite, say: this row's own trouble
                log.exception("a token could not be drawn")
                ticket.fail(ServeError(500, "internal_error", "no token could be drawn"))
                done = True
            if done:
                lane.leaving.add(place)


def _end_tokens(config: Any) -> frozenset[int]:
    ends = getattr(config, "eos_token_id", None)
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)
