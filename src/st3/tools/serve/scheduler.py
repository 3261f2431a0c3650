"""The engine's thread: takes waiting requests in, and decodes the running ones together."""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from st3.errors import UnsupportedModelError
from st3.tools.serve.batch import JoinedBatch, Prefilled, prefill
from st3.tools.serve.budget import Budget, columns_at_peak
from st3.tools.serve.errors import ServeError, refused, unavailable
from st3.tools.serve.lane import Lane, Stats
from st3.tools.serve.sampling import Sampler
from st3.tools.serve.text import TextStream
from st3.tools.serve.ticket import Kept, Request, Ticket
from st3.trimmer import Trimmer

log = logging.getLogger("st3.tools.serve")


class Scheduler:
    """Rounds of one model. Other threads add to the queue, look at the figures, and stop it.

    Args:
        decoder: the trimmer that drops nothing, on st3's cache; attached while there is work.
        trimmer: finds a policy's.
        max_rows, max_prefills: see :class:`~st3.tools.serve.engine.Engine`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        decoder: Trimmer,
        trimmer: Callable[[str], Trimmer],
        budget: Budget,
        max_rows: int,
        max_prefills: int,
    ) -> None:
        self.model, self.budget = model, budget
        self.max_rows, self.max_prefills = max_rows, max_prefills
        self.waiting: deque[Ticket] = deque()
        self.wake = threading.Condition()
        self.accepts, self.stopping = True, False
        self._decoder, self._trimmer = decoder, trimmer
        self._tokenizer = copy.deepcopy(tokenizer)  # tokenizers are not for two threads at once
        self._ends = _end_tokens(model.generation_config)
        self.lanes: list[Lane] = []
        self._most_running = self._steps = self._tokens = 0

    def stats(self) -> Stats:
        with self.wake:
            lanes = list(self.lanes)
            return Stats(
                running=sum(len(lane.columns()) for lane in lanes),
                waiting=len(self.waiting),
                lanes=len(lanes),
                budget=self.budget.total,
                reserved=sum(self.budget.bytes(lane.columns()) for lane in lanes),
                allocated=sum(lane.batch.allocated_bytes for lane in lanes),
                most_running=self._most_running,
                steps=self._steps,
                tokens=self._tokens,
            )

    def run(self) -> None:
        """Until nothing more is accepted, and everything accepted has been answered."""
        try:
            self._serve()
        except Exception:  # the trimmer cannot be attached, say: nothing can be answered any more
            log.exception("the engine has stopped")
            self.accepts = False
            self._give_up(ServeError(500, "internal_error", "the engine has stopped"))

    def _serve(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.waiting or not self.accepts)
                if not self.waiting:
                    return
            with torch.no_grad(), self._decoder:
                while self.waiting or self.lanes:
                    try:
                        self._turn()
                    except Exception:
                        log.exception("the engine failed; its requests are given up")
                        self._give_up(ServeError(500, "internal_error", "the engine failed"))

    def _turn(self) -> None:
        """One round: who left, who comes, one step of each lane."""
        if self.stopping:
            self._give_up(unavailable("the server was shut down before this answer was complete"))
        self._drop_the_gone()
        newcomers = self._admit()
        for ticket, lane in newcomers:
            self._start(ticket, lane)
        for lane in list(self.lanes):
            self._step(lane)
        with self.wake:
            self.lanes = [lane for lane in self.lanes if lane.columns()]

    def _give_up(self, error: ServeError) -> None:
        with self.wake:
            tickets = list(self.waiting)
            self.waiting.clear()
            for lane in self.lanes:
                tickets += [*lane.tickets, *(ticket for ticket, _ in lane.new)]
            self.lanes = []
        for ticket in tickets:
            ticket.fail(error)

    def _drop_the_gone(self) -> None:
        """Free what nobody waits for any more, and what took too long."""
        now = time.monotonic()
        with self.wake:
            gone = [t for t in self.waiting if t.cancelled or t.late(now)]
            for ticket in gone:
                self.waiting.remove(ticket)
            for lane in self.lanes:
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
        with self.wake:
            lanes = [lane.columns() for lane in self.lanes]
            while self.waiting and len(admitted) < self.max_prefills:
                ticket = self.waiting[0]
                place = self.budget.place(lanes, ticket.columns, self.max_rows)
                if place is None:
                    break
                self.waiting.popleft()
                if place == len(lanes):
                    batch = JoinedBatch(self.model, self._decoder.parts.windows)
                    self.lanes.append(Lane(batch))
                    lanes.append([])
                lanes[place].append(ticket.columns)
                admitted.append((ticket, self.lanes[place]))
        return admitted

    def _start(self, ticket: Ticket, lane: Lane) -> None:
        """Prefill, and give out the first token."""
        ticket.started = time.monotonic()
        request = ticket.request
        try:
            prompt = self._prefill(request)
            self._open(ticket, prompt)
            if prompt.kept is not None:
                ticket.tell(Kept(prompt.kept))
            token = self._choose(ticket, prompt.logits)
        except torch.OutOfMemoryError as error:
            log.warning("out of memory in a prefill: %s", error)
            ticket.fail(ServeError(503, "out_of_memory", "no memory for this prompt: try again"))
            return
        except (UnsupportedModelError, ValueError, IndexError, ArithmeticError) as error:
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
        request, row = ticket.request, prompt.sequence
        ticket.row, ticket.visual = row, prompt.visual
        ids = request.inputs["input_ids"][0].tolist()
        ticket.sampler = Sampler(request.sampling, self.model.generation_config, ids)
        ticket.request = dataclasses.replace(request, inputs={}, spots=None)  # its pixels are seen
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
        trimmer = self._trimmer(request.policy)
        try:
            if trimmer is self._decoder:
                return prefill(self.model, inputs, trimmer, request.spots)
            with trimmer:
                return prefill(self.model, inputs, trimmer, request.spots)
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
            with self.wake:
                running = sum(len(other.columns()) for other in self.lanes)
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
