"""A workload, measured for all methods in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from st3.cost import TextDims, prefill_flops
from st3.engine.plan import lay_out
from st3.engine.wiring import Wiring
from st3.tools.bench import prompts
from st3.tools.bench.bound import over_bound, read_bandwidth
from st3.tools.bench.clock import Deadline, Ratio, in_turn, median, speed_up
from st3.tools.bench.measure import (
    Footprint,
    Generation,
    WeightsOnly,
    footprint,
    generation,
    prefill,
)
from st3.tools.bench.methods import OWN_CACHE, Method
from st3.tools.bench.models import Subject
from st3.tools.bench.overhead import Overhead, selection_overhead
from st3.tools.bench.possible import Possible, possible
from st3.tools.bench.possible import steps_of as steps_of_possible
from st3.tools.bench.tower import tower


@dataclass(frozen=True)
class Workload:
    """Prompts and what is done with them.

    Attributes:
        batch, visual, text, images: rows, and tokens of each row.
        new_tokens: length of the generation; 0 measures the prefill alone.
        ragged: rows of different lengths, padded to the same columns.
        repeats: rounds of each measurement.
        layer_rounds: rounds in which the prefill of each policy asked for is compared with the bare
            layers on as many columns, see :mod:`st3.tools.bench.possible`; 0: not at all. Ragged
            batches go without.
    """

    batch: int = 1
    visual: int = 576
    text: int = 64
    images: int = 1
    new_tokens: int = 64
    ragged: bool = False
    repeats: int = 5
    layer_rounds: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 0 or self.new_tokens == 1:
            raise ValueError(
                "new tokens: at least 2, so that there is a decode step, or 0 for the prefill alone"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.layer_rounds < 0:
            raise ValueError(f"layer rounds cannot be negative, got {self.layer_rounds}")

    @property
    def title(self) -> str:
        rows = "ragged batch" if self.ragged else "batch"
        tokens = f"{self.visual} visual and {self.text} text tokens"
        new = f", {self.new_tokens} new tokens" if self.new_tokens else ""
        return f"{rows} {self.batch}, {tokens}{new}"

    def rows(self) -> list[prompts.Row]:
        if self.ragged:
            return prompts.ragged(self.batch, self.visual, self.text)
        return prompts.uniform(self.batch, self.visual, self.text, self.images)


@dataclass
class Row:
    """What was measured of one method. Times in seconds, one entry for each round."""

    label: str
    policy: str
    flops_ratio: float | None  # untrimmed / trimmed, of the decoder's prefill
    prefill: list[float] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    footprint: Footprint | None = None
    overhead: Overhead | None = None
    possible: Possible | None = None

    @property
    def first(self) -> list[float]:
        return [g.first for g in self.generations]

    @property
    def tpot(self) -> list[float]:
        """The median step of each round."""
        return [statistics.median(g.steps) for g in self.generations]

    @property
    def total(self) -> list[float]:
        return [g.total for g in self.generations]


@dataclass
class Result:
    """A workload's rows; the first is the reference."""

    subject: str
    workload: Workload
    rows: list[Row]
    tower: list[float] = field(default_factory=list)
    bandwidth: float | None = None

    @property
    def reference(self) -> Row:
        return self.rows[0]

    def with_tower(self, times: Sequence[float]) -> list[float]:
        """Times that begin with the image: the tower's median is added."""
        extra = median(self.tower) or 0.0
        return [extra + seconds for seconds in times]

    @property
    def own_cache(self) -> Row | None:
        """The row of the untrimmed model on st3's cache, if it was measured."""
        return next((row for row in self.rows if row.label == OWN_CACHE), None)

    def ratio(self, row: Row, what: str, over: Row | None = None) -> Ratio | None:
        """Speed-up of ``row`` over another one, by default over the reference: of "prefill",
        "ttft", "tpot" or "total"."""
        times = {"ttft": "first"}.get(what, what)
        pair = [list(getattr(r, times)) for r in (over or self.reference, row)]
        if what in ("ttft", "total"):
            pair = [self.with_tower(seconds) for seconds in pair]
        return speed_up(pair[0], pair[1])

    @property
    def weights_only(self) -> float | None:
        """Seconds of a weights-only step, median over steps and methods."""
        held = [row.footprint for row in self.rows if row.footprint is not None]
        return median([seconds for one in held for seconds in one.weights])

    def over_bound(self, row: Row) -> float | None:
        """Decode step over its bound, median over the steps."""
        if self.bandwidth is None or row.footprint is None:
            return None
        return over_bound(row.footprint, self.bandwidth)


def steps_of(workload: Workload, methods: Sequence[Method], prefills: bool = True) -> int:
    """How often :func:`run` reports progress, at most."""
    kinds = bool(workload.new_tokens) + prefills
    layers = steps_of_possible(workload.layer_rounds) if prefills and not workload.ragged else 0
    steps = (kinds * (workload.repeats + 1) + prefills) * len(methods)
    return steps + layers * sum(method.asked and method.own_engine for method in methods)


def run(
    subject: Subject,
    workload: Workload,
    methods: Sequence[Method],
    on_step: Callable[[str], None] = lambda what: None,
    deadline: Deadline | None = None,
    bandwidth: float | None = None,
    prefills: bool = True,
) -> Result:
    """Measure ``methods`` on one workload: an untimed run of each, then rounds in turn.

    Args:
        subject: the model that is measured.
        workload: the prompts, and the number of rounds.
        methods: rows of the tables, the reference first (:func:`compare` makes them).
        on_step: called with a word on what was done, :func:`steps_of` times at most.
        deadline: behind it no further round is begun (one round is always done).
        bandwidth: bytes per second, if it was measured before.
        prefills: time the prefill alone and st3's part of it, too.

    Returns:
        every sample, in seconds and bytes.

    Raises:
        ValueError: prompts or policies that do not fit the model, or each other.
    """
    methods = [m for m in methods if not (m.equal_rows and workload.ragged)]
    rows = workload.rows()
    model, tokens = subject.model, workload.new_tokens
    of = {m.label: _rows_of(m, rows, model) for m in methods}
    made = {label: prompts.build(own, subject.vocab, subject.device) for label, own in of.items()}
    table = {m.label: Row(m.label, _policy(m), _flops(subject, m, rows)) for m in methods}
    result = Result(subject.name, workload, list(table.values()))

    def attached(method: Method, what: Callable[[prompts.Prompt], Any]) -> Callable[[], Any]:
        prompt = made[method.label]

        def call() -> Any:
            with method.attach(model, prompt):
                return what(prompt)

        return call

    def measure(
        what: Callable[[prompts.Prompt], Any], untimed: Callable[[prompts.Prompt], Any], name: str
    ) -> Iterator[Any]:
        """(row, untimed result, timed results) of each method."""
        first = {}
        for method in methods:
            first[method.label] = attached(method, untimed)()
            on_step(f"{name} (untimed)")
        calls = {m.label: attached(m, what) for m in methods}
        timed = in_turn(calls, workload.repeats, lambda: on_step(name), deadline)
        return ((table[label], first[label], timed[label]) for label in calls)

    if tokens:
        result.bandwidth = bandwidth or read_bandwidth(subject.device)
        result.tower = _run_tower(subject, workload)
    if prefills:
        once = partial(prefill, model)
        for row, _, seconds in measure(once, once, "prefill"):
            row.prefill = seconds
        for method in methods:
            table[method.label].overhead = selection_overhead(model, made[method.label], method)
            on_step("selection")
        for method in methods if workload.layer_rounds and not workload.ragged else []:
            if method.asked and method.own_engine:
                table[method.label].possible = possible(
                    model,
                    made[method.label],
                    method,
                    workload.layer_rounds,
                    partial(on_step, "layers"),
                    deadline,
                )
    if tokens:
        several = partial(generation, model, new_tokens=tokens)
        spare = WeightsOnly(model, workload.batch)
        watched = partial(footprint, model, new_tokens=tokens, spare=spare)
        for row, held, generations in measure(several, watched, "generation"):
            row.footprint, row.generations = held, generations
    return result


def _run_tower(subject: Subject, workload: Workload) -> list[float]:
    if workload.ragged:
        return []
    look = tower(subject.model, workload.visual, workload.batch)
    if look is None:
        return []
    look()
    return [look() for _ in range(min(3, workload.repeats))]


def _policy(method: Method) -> str:
    return "none" if method.policy is None else str(method.policy)


def _rows_of(method: Method, rows: Sequence[prompts.Row], model: Any) -> list[prompts.Row]:
    """The rows that a method gets: all visual tokens, or fewer."""
    if method.fewer is None:
        return list(rows)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    share = method.fewer.schedule(layers).mean_share
    return [
        prompts.Row(row.text, tuple(max(1, round(share * n)) for n in row.images)) for row in rows
    ]


def _flops(subject: Subject, method: Method, rows: Sequence[prompts.Row]) -> float | None:
    """FLOPs of the untrimmed prefill over those of this method, all rows."""
    if method.policy is None and method.fewer is None:
        return 1.0
    try:
        dims = TextDims.from_config(subject.model.config)
    except ValueError:  # a decoder that the cost model does not describe
        return None
    schedule = None
    if method.policy is not None:
        schedule = lay_out(method.policy, Wiring(dims.sources, dims.in_order))
    own = _rows_of(method, rows, subject.model)
    full = sum(prefill_flops(dims, row.text, row.visual).total for row in rows)
    left = sum(prefill_flops(dims, row.text, row.visual, schedule).total for row in own)
    return full / left
