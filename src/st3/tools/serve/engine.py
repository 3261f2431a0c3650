"""The engine: answers many requests at once with one model, within a budget of KV bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

from st3.engine.kv.joined import visible_counts
from st3.errors import UnsupportedModelError
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import Policy, parse, parse_text
from st3.tools.common.memory import available_bytes
from st3.tools.serve.budget import Budget, columns_at_peak, entry_bytes, row_bytes
from st3.tools.serve.errors import overloaded, refused, unavailable
from st3.tools.serve.kept import spots_of
from st3.tools.serve.lane import Stats
from st3.tools.serve.prompt import Prompts
from st3.tools.serve.sampling import Sampling, check_generation_config
from st3.tools.serve.scheduler import Scheduler
from st3.tools.serve.ticket import Event, Failed, Finished, Listener, Request, Ticket
from st3.trimmer import Trimmer


class Engine:
    """Answers requests with one model, many at once, within a budget of KV bytes.

    Requests are admitted in the order of their arrival, as soon as what they will hold at most
    (their policy's visible tokens, their text, their longest answer) fits into the budget. Each
    is prefilled alone, joins a running batch, and leaves it when it is done.

    Args:
        model, processor: as ``AutoModelForImageTextToText`` and ``AutoProcessor`` load them. While
            the engine is busy it has a trimmer attached: use the model for nothing else meanwhile.
        policy: of requests that name none; a string, a policy or the file of one.
        kv_budget_bytes: for KV entries; None: half of what the device has free now. A prompt's
            activations, and the entries of those being prefilled, come on top.
        queue_limit: requests that may wait.
        queue_bytes: that the inputs of waiting requests may take, pixels above all.
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
        policy: str | Policy = DEFAULT_POLICY,
        kv_budget_bytes: int | None = None,
        *,
        queue_limit: int = 64,
        queue_bytes: int = 1 << 30,
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
        given = parse(policy)
        self.policy = str(given)
        self.queue_limit, self.queue_bytes = queue_limit, queue_bytes
        Trimmer(model, given)  # a file's policy may have been found for another model
        # Also the trimmer of untrimmed requests: st3's cache, nothing dropped.
        self._decoder = Trimmer(model, "none", own_cache=True)
        if self._decoder.wiring.in_order:
            raise UnsupportedModelError(
                f"{self._decoder.family.name} has indexes beside its KV entries, which cannot join "
                "a running batch: answer with st3 batch instead"
            )
        self._trimmers: OrderedDict[str, Trimmer] = OrderedDict()
        self._trimmers_lock = threading.Lock()
        with self.trimmer(self.policy):  # refuses now what it would refuse at the first request
            pass
        if kv_budget_bytes is None:
            free = available_bytes(model.device)
            if free is None:
                raise ValueError(f"free memory of {model.device} is unknown: set kv_budget_bytes")
            kv_budget_bytes = free // 2
        entries = entry_bytes(model, self._decoder.schedule.num_layers)
        if kv_budget_bytes < sum(entries):
            raise ValueError(f"a KV budget of {kv_budget_bytes} bytes does not hold one token")
        states = row_bytes(model) if self._decoder.wiring.has_states else 0
        self.budget = Budget(kv_budget_bytes, entries, slack, states)
        self.prompts = Prompts(model, processor, max_prompt_tokens)
        self._scheduler = Scheduler(
            model,
            processor.tokenizer,
            self._decoder,
            self.trimmer,
            self.budget,
            max_rows,
            max_prefills_per_step,
        )
        self._thread = threading.Thread(target=self._scheduler.run, name="st3-engine", daemon=True)
        self._thread.start()

    # What callers use ---------------------------------------------------------------------------

    def trimmer(self, policy: str) -> Trimmer:
        """The trimmer of a policy. Raises ValueError for one that does not fit this model."""
        name = str(parse_text(policy))
        with self._trimmers_lock:
            found = self._trimmers.pop(name, None)
            if found is None:
                found = Trimmer(self.model, name)
                if found.policy.recalls:
                    raise ValueError(
                        f"policy {name}: it shows hidden tokens again, which a server evicts: use "
                        "one that recalls nothing, such as st3 with rerank_every"
                    )
                found = found if found.active else self._decoder
            self._trimmers[name] = found
            while len(self._trimmers) > 32:
                self._trimmers.popitem(last=False)
            return found

    def prepare(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        policy: str | None = None,
        budget: float | None = None,
        max_tokens: int = 256,
        shorten: bool = False,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        timeout: float | None = None,
        kept: bool = False,
    ) -> Request:
        """Make a conversation ready: chat template, tokens, pixels, and what it will need.

        Args:
            messages: turns with ``role`` and ``content``, a list of ``{"type": "text", "text"}``
                and ``{"type": "image", "image": PIL image}``.
            policy: its string, never a file; None: the engine's.
            budget: mean share of the visual tokens over the layers, in place of the policy's own.
            shorten: whether ``max_tokens`` may be less, so that it fits the model's positions.
            kept: whether the listener shall be told what each layer saw of the images.

        Raises:
            ServeError: for a conversation that this model or this budget can never answer.
        """
        name = self.policy if policy is None else policy
        try:
            share = {} if budget is None else {"budget": budget}
            name = str(parse_text(name, **share))
            trimmer = self.trimmer(name)
        except (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError) as error:
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
        spots = None
        if kept:
            spots = spots_of(
                self.model, inputs, visual, messages, lambda m: self.prompts.tokenise(m)[0]
            )
        return Request(
            inputs, name, tokens, visual, max_tokens, sampling or Sampling(), tuple(stop), timeout,
            columns, spots,
        )  # fmt: skip

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queue a request. ``listener`` gets its events, from the engine's thread: text deltas,
        then one :class:`Finished` or :class:`Failed`.

        Raises:
            ServeError: 429 when the queue is full, 503 when the engine is closing.
        """
        ticket = Ticket(request, listener)
        with self._scheduler.wake:
            if not self._scheduler.accepts:
                raise unavailable()
            waiting = self._scheduler.waiting
            held = sum(other.request.nbytes for other in waiting)
            too_much = bool(waiting) and held + request.nbytes > self.queue_bytes
            if len(waiting) >= self.queue_limit or too_much:
                raise overloaded(
                    f"{len(waiting)} requests are waiting already: try again later",
                    self._retry_after(),
                )
            waiting.append(ticket)
            self._scheduler.wake.notify()
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
        return len(self._scheduler.waiting) >= self.queue_limit

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._scheduler.accepts

    def stats(self) -> Stats:
        return self._scheduler.stats()

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs. Takes no lock."""
        return bool(self._scheduler.waiting or self._scheduler.lanes)

    def hurry(self) -> None:
        """Give up what is not answered yet, with status 503, and take no more. Does not wait."""
        with self._scheduler.wake:
            self._scheduler.accepts, self._scheduler.stopping = False, True
            self._scheduler.wake.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, finish the accepted ones, and stop. Behind ``timeout`` seconds
        those still there are failed.

        Returns:
            whether all were finished.
        """
        with self._scheduler.wake:
            self._scheduler.accepts = False
            self._scheduler.wake.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        self.hurry()
        self._thread.join()
        return False

    def _retry_after(self) -> int:
        """Seconds, from how many wait; a hint."""
        return max(1, min(60, len(self._scheduler.waiting) // 8))
