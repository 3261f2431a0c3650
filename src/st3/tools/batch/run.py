"""A batch run from its first id to its summary."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from st3.methods.policies import Policy, parse, plain
from st3.tools.batch.inputs import BadRow, Ref, Source, open_source, same_row
from st3.tools.batch.store import Store, write_whole
from st3.tools.batch.worker import Done, Worker
from st3.tools.common.conditions import versions
from st3.tools.common.errors import first_line


class BatchError(Exception):
    """A run that cannot start or go on, with the remedy in its message."""


class Loaded(Protocol):
    """What a loader gives: a model in eval mode on its device, and its processor."""

    @property
    def model(self) -> Any: ...

    @property
    def processor(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run is asked for.

    Attributes:
        input, prompt: see :func:`~st3.tools.batch.inputs.open_source`.
        model, policy, max_new_tokens: what the answers depend on; recorded beside them. A policy
            is given as its string, or as it was read.
        batch_size: rows answered together.
        window: rows sorted by length together; what an actor is given at a time.
        system: the system prompt of every row.
    """

    input: Path
    prompt: str | None
    model: str
    policy: str | Policy
    max_new_tokens: int
    batch_size: int
    window: int
    system: str | None = None

    def asked(self) -> dict[str, Any]:
        """What must not change when a run is continued."""
        return {
            "input": str(self.input.resolve()),
            "model": self.model,
            "policy": str(self.policy),
            "policy_in_full": repr(plain(parse(self.policy))),  # defaults may change
            **{name: getattr(self, name) for name in ("prompt", "system", "max_new_tokens")},
            **{name: versions()[name] for name in ("st3", "torch", "transformers")},
        }

    def worker(self, loaded: Loaded) -> Worker:
        """Raises BatchError for a policy that does not fit the model."""
        try:
            return Worker(
                loaded.model, loaded.processor, self.policy, self.batch_size, self.max_new_tokens,
                self.system,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise BatchError(f"policy {self.policy}: {first_line(error)}") from error


Load = Callable[[], Loaded]
Execute = Callable[[Options, Load, list[list[Ref]]], Iterator[Done]]


def here(options: Options, load: Load, windows: list[list[Ref]]) -> Iterator[Done]:
    """Answer in this process."""
    source = open_source(options.input, options.prompt)
    worker = options.worker(load())
    for window in windows:
        yield from worker.window(source.read(window), source.base)


def run(
    options: Options,
    load: Load,
    out: Path,
    execute: Execute = here,
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_done: Callable[[Done], None] = lambda done: None,
    flush_seconds: float = 30.0,
) -> dict[str, Any]:
    """Answer all rows that ``out`` has no answer to yet.

    Args:
        load: makes the model; on Ray it is called in each actor, and must be picklable.
        execute: :func:`here`, or :func:`st3.tools.batch.ray.on_ray`'s.
        on_start: called with the rows in all, and those that are answered already.
        on_done: called after each batch.
        flush_seconds: a killed run loses at most the answers of so many seconds, and repeats them.

    Returns:
        the summary, which is also written to ``summary.json``.

    Raises:
        BatchError: for wrong input, a policy that does not fit the model, or an output folder that
            is in use or of another run.
        WriteError: the output folder cannot be written any more.
    """
    try:
        source = open_source(options.input, options.prompt)
        refs = _refs(source)
        store = Store(out, options.asked(), seconds=flush_seconds)
    except (ValueError, OSError) as error:
        raise BatchError(str(error)) from error
    with store:
        stale = _stale(source, refs, store)
        store.drop(stale)
        todo = [ref for ref in refs if ref.id not in store.done]
        before = len(refs) - len(todo)
        on_start(len(refs), before)
        size = options.window
        windows = [todo[first : first + size] for first in range(0, len(todo), size)]
        meter = _Meter()
        for done in execute(options, load, windows) if windows else ():
            try:
                store.ran(done.ran)
            except ValueError as error:
                raise BatchError(str(error)) from error
            store.add(done.answers, done.errors)
            meter.add(done)
            on_done(done)
        store.flush()
        summary = _summary(options, store, len(refs), before, meter)
        summary["this_run"]["stale"] = len(stale)
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _refs(source: Source) -> list[Ref]:
    refs: list[Ref] = []
    seen: set[str] = set()
    for ref in source.scan():
        if ref.id in seen:
            raise BatchError(
                f"the id {ref.id!r} comes twice in the input: ids must be unique (rows without one "
                "have their number, from 1)"
            )
        seen.add(ref.id)
        refs.append(ref)
    if not refs:
        raise BatchError("the input has no rows")
    return refs


def _stale(source: Source, refs: list[Ref], store: Store) -> set[str]:
    """The ids of answers whose rows are gone, or have another image or prompt now."""
    if not store.done:
        return set()
    answered = [ref for ref in refs if ref.id in store.done]
    stale = set(store.done) - {ref.id for ref in answered}
    for row in source.read(answered):
        if isinstance(row, BadRow) or not same_row(store.done[row.id][2], row.mark(source.base)):
            stale.add(row.id)
    return stale


class _Meter:
    """Rows and tokens per second, from the start of the first batch: loading is not counted."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.end = 0.0
        self.rows = self.tokens = 0

    def add(self, done: Done) -> None:
        self.end = time.monotonic()
        if self.start is None:
            self.start = self.end - done.seconds
        self.rows += len(done.answers)
        self.tokens += sum(answer["new_tokens"] for answer in done.answers)

    @property
    def seconds(self) -> float:
        return 0.0 if self.start is None else self.end - self.start

    def rate(self, count: int) -> float | None:
        return count / self.seconds if self.seconds else None


def _summary(
    options: Options, store: Store, rows: int, before: int, meter: _Meter
) -> dict[str, Any]:
    shares = [share for share, _, _ in store.done.values()]
    return {
        "model": options.model,
        "policy": str(options.policy),
        "rows": rows,
        "answered": len(store.done),
        "errors": store.failed,
        "new_tokens": sum(tokens for _, tokens, _ in store.done.values()),
        "mean_kv_saved": 1 - sum(shares) / len(shares) if shares else None,
        "this_run": {
            "answered_before": before,
            "answered": meter.rows,
            "new_tokens": meter.tokens,
            "seconds": meter.seconds,
            "images_per_s": meter.rate(meter.rows),
            "tokens_per_s": meter.rate(meter.tokens),
        },
    }
