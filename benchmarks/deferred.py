"""What a prefill gains by putting off what no drop needs: scores, and writing to the KV cache.

    python -m benchmarks.deferred

A layer whose score only annealing reads takes it, and writes its prompt to the cache, when the next
pass begins. Here the same prefill is timed in turns with each of the two done at once, and without
trimming; then the first step behind it, which pays for what was put off. Let nothing else run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import st3
from benchmarks.old_new import POLICY, SHAPES, Worker
from st3.engine.kv.store import KVStore
from st3.hf.cache import stores_of
from st3.methods.policies import Policy
from st3.methods.scores import Attention
from st3.tools.common.conditions import conditions, in_words
from st3.tools.common.tables import markdown

RESULTS = Path(__file__).with_name("results")
WAYS = ("untouched", "put off", "scored at once", "written at once", "both at once")


@dataclass(frozen=True)
class AtOnce(Attention):
    """The same score, which does not say that it reads the last row alone: so it never waits."""

    @property
    def last_row(self) -> bool:
        return False


@contextlib.contextmanager
def way(worker: Worker, name: str, visual: Tensor) -> Iterator[None]:
    policy: Policy = st3.parse(POLICY)
    if name in ("scored at once", "both at once"):

        class Scored(type(policy)):  # type: ignore[misc]
            def scorer(self) -> AtOnce:
                return AtOnce()

        policy = Scored(**vars(policy))
    with (
        contextlib.nullcontext()
        if name == "untouched"
        else st3.trim(worker.model, policy, visual_mask=visual)
    ):
        yield


def measure(worker: Worker, name: str, length: int, batch: int) -> tuple[float, float]:
    """Seconds of a prefill and of the first step behind it."""
    visual = torch.zeros(batch, length + 60, dtype=torch.bool)
    visual[:, 20 : 20 + length] = True
    with way(worker, name, visual):
        cache, _, seconds = worker._prefill(length, batch)
        if name in ("written at once", "both at once"):
            start = worker.clock()
            for store in stores_of(cache).values():
                if isinstance(store, KVStore):
                    store.write()
            seconds += worker.clock() - start
        token = torch.full((batch, 1), 7)
        mask = torch.ones(batch, length + 61, dtype=torch.long)
        return seconds, worker._timed(input_ids=token, attention_mask=mask, cache=cache)[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["mha", "gqa-32-8"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[576, 2880])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows, samples = [], {}
    worker = Worker()
    for shape in given.shapes:
        worker.make(shape, given.dtype, 1, given.clock)
        for length in given.lengths:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
            for turn in range(given.rounds + 1):
                for name in WAYS:
                    taken = measure(worker, name, length, given.batch)
                    if turn:  # the first turn warms up
                        found[name].append(taken)
                print(f"{shape}, {length}: turn {turn} of {given.rounds}", flush=True)
            samples[f"{shape}, {length}"] = found
            usual = statistics.median(seconds for seconds, _ in found["put off"])
            for name, pairs in found.items():
                prefill, step = (statistics.median(column) for column in zip(*pairs, strict=True))
                rows.append(
                    [shape, length, name, f"{1e3 * prefill:.1f}", f"{prefill / usual:.3f}",
                     f"{1e3 * step:.1f}"]
                )  # fmt: skip
    head = ["shape", "visual tokens", "scores and cache", "prefill, ms", "of put off", "step 1, ms"]
    told = conditions(torch.device("cpu"), getattr(torch, given.dtype))
    command = "python -m benchmarks.deferred"
    page = f"# What putting off gains\n\n{in_words(told)}\n\n`{command}`: batch {given.batch}, "
    page += f"{given.clock} clock, medians of {given.rounds} turns.\n\n"
    page += markdown(head, rows, left=(0, 2)) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "deferred.md").write_text(page)
    (given.out / "deferred.json").write_text(json.dumps({"conditions": told, "samples": samples}))
    print(page)


if __name__ == "__main__":
    main()
