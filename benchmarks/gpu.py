"""The GPU table in parts of at most nine minutes each: bf16, random weights.

    PYTHONPATH=src python benchmarks/gpu.py --list
    PYTHONPATH=src python benchmarks/gpu.py --part 1 --out results

Needs Python 3.11 or newer, torch, transformers, typer and rich; matplotlib for pictures, flash_attn
for its rows. st3 need not be installed. Each part writes its JSON and Markdown to --out as soon as
it has something.

latency: prefill, TTFT and TPOT at batch 1, 8 and 32, with sdpa and, where it is installed, flash
attention. throughput: the largest batch that fits and its tokens per second, and what the profiler
says of decode steps and of the selection. graphs: decode steps compiled into CUDA graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from st3.methods import DEFAULT_POLICY
from st3.methods.policies import NoTrim, parse
from st3.tools.bench import (
    SHAPES,
    Deadline,
    Method,
    Result,
    Subject,
    Workload,
    compare,
    from_shape,
    own_cache,
    run,
    untouched,
)
from st3.tools.bench.bound import read_bandwidth
from st3.tools.bench.capacity import measure_capacity
from st3.tools.bench.compiled import compiled_decode
from st3.tools.bench.files import save
from st3.tools.bench.profile import profile_decode, selection_share
from st3.tools.bench.prompts import build
from st3.tools.common.conditions import conditions, in_words
from st3.tools.common.load import device_of, dtype_of
from st3.tools.common.tables import markdown

RESULTS = Path(__file__).with_name("results")
# The paper's settings for 32 and 40 layers; the default policy for other depths.
POLICIES = {
    "llava-1.5-7b": "st3-7b",
    "llava-1.5-13b": "st3-13b",
    "llava-next-7b": "st3-7b",
    "qwen2.5-vl-7b": DEFAULT_POLICY,
}
KINDS = ("latency", "throughput", "graphs")
PARTS = [(shape, kind) for kind in KINDS for shape in POLICIES]


@dataclasses.dataclass
class Part:
    """One part under way."""

    given: argparse.Namespace
    shape: str
    kind: str
    device: torch.device
    deadline: Deadline
    notes: list[str] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: list[Result] = dataclasses.field(default_factory=list)

    @property
    def policy(self) -> str:
        return POLICIES.get(self.shape, DEFAULT_POLICY)

    def subject(self, attention: str = "sdpa") -> Subject:
        start = time.monotonic()
        made = from_shape(self.shape, self.device, dtype_of(self.given.dtype), attention)
        self.log(f"{self.shape} with {attention}: made in {time.monotonic() - start:.0f} s")
        return made

    def workload(self, subject: Subject, batch: int, repeats: int) -> Workload:
        return Workload(
            batch=batch,
            visual=subject.visual_tokens,
            text=subject.text_tokens,
            images=subject.images,
            new_tokens=self.given.new_tokens,
            repeats=repeats,
        )

    def core(self) -> list[Method]:
        return compare([self.policy], peers=False)

    def enough_time(self, what: str, seconds: float) -> bool:
        """Whether ``what`` may still begin; notes it if not."""
        if self.deadline.left >= seconds:
            return True
        self.notes.append(f"left out for want of time: {what}")
        self.log(self.notes[-1])
        return False

    def log(self, text: str) -> None:
        left = self.deadline.left
        print(f"[{left:4.0f} s left] {text}", file=sys.stderr, flush=True)

    def write(self) -> None:
        where = conditions(self.device, dtype_of(self.given.dtype))
        name = f"gpu-{self.shape}-{self.kind}"
        plots = importlib.util.find_spec("matplotlib") is not None and not self.given.no_plots
        data, page, *_ = save(
            self.results, where, self.given.out, name, plots and bool(self.results)
        )
        everything = json.loads(data.read_text()) | {"notes": self.notes} | self.extra
        data.write_text(json.dumps(everything, indent=1) + "\n")
        if not self.results:
            page.write_text(f"# {name}\n\n`{where['command']}`\n\n{in_words(where)}.\n")
        with page.open("a") as file:
            file.writelines(_table(title, rows) for title, rows in self.extra.items())
            file.writelines(f"\n{note}.\n" for note in self.notes)


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    """Rows of plain values as a Markdown table."""

    def show(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(rows[0]) if rows else []
    cells = [[show(value) for value in row.values()] for row in rows]
    return f"\n## {title}\n\n{markdown(names, cells, left=range(len(names)))}\n"


def latency(part: Part) -> None:
    """The smallest batch with every method, the others with the references and ST3 alone."""
    kernels = ["sdpa"]
    if importlib.util.find_spec("flash_attn") is not None and part.device.type == "cuda":
        kernels.append("flash_attention_2")
    else:
        part.notes.append("flash attention is not installed: sdpa alone")
    bandwidth = read_bandwidth(part.device)
    for attention in kernels:
        subject = part.subject(attention)
        subject = dataclasses.replace(subject, name=f"{subject.name}, {attention}")
        for batch in part.given.batch:
            first = batch == part.given.batch[0] and attention == "sdpa"
            if not part.enough_time(f"batch {batch}, {attention}", 40):
                continue
            methods = compare([part.policy]) if first else part.core()
            workload = part.workload(subject, batch, part.given.repeats or (5 if first else 3))
            try:
                result = run(
                    subject, workload, methods, deadline=part.deadline, bandwidth=bandwidth
                )
            except torch.OutOfMemoryError:
                part.notes.append(f"out of memory: batch {batch}, {attention}")
                torch.cuda.empty_cache()
                continue
            part.results.append(result)
            part.log(workload.title)
            part.write()
        del subject
        gc.collect()
        if part.device.type == "cuda":
            torch.cuda.empty_cache()


def throughput(part: Part) -> None:
    """Largest batch, tokens per second there, and the profiler's verdict."""
    subject = part.subject()
    workload = part.workload(subject, 1, part.given.repeats or 2)
    _profiles(part, subject)
    part.write()
    limit = part.given.limit or (4096 if part.device.type == "cuda" else 8)
    rows = measure_capacity(
        subject, workload, [untouched(), own_cache(), *part.core()[2:]], None, part.deadline, limit
    )
    base = rows[0]
    part.extra["largest batch"] = [
        {
            "method": row.label,
            "predicted batch": row.predicted,
            "largest batch": row.largest,
            "over untouched": row.largest / base.largest,
            "tokens/s": row.tokens_per_s,
            "tokens/s over untouched": (row.tokens_per_s or 0) / (base.tokens_per_s or 1),
            "TPOT, ms": 1e3 * (row.tpot or 0),
            "first token, ms": 1e3 * min((g.first for g in row.generations), default=0),
            "peak above the weights, GiB": None if row.peak is None else row.peak / 2**30,
            "rounds": len(row.generations),
        }
        for row in rows
    ]


def _profiles(part: Part, subject: Subject) -> None:
    """One step's waits and kernels at two batches; the selection's share of kernel time."""
    rows, shares = [], []
    layers = subject.text_config.num_hidden_layers
    for batch in part.given.batch[:2]:
        rows_of_prompt = part.workload(subject, batch, 1).rows()
        prompt = build(rows_of_prompt, subject.vocab, subject.device)
        for method in part.core():
            seen = profile_decode(subject.model, prompt, method)
            most = max(seen.waits.values())
            row = {"method": method.label, "batch": batch}
            row |= {name: count for name, count in seen.waits.items() if count or "Stream" in name}
            row |= {"wait in each layer": most >= layers, "launches": seen.launches}
            rows.append(row | {"kernel time, ms": 1e3 * seen.busy})
            if method.own_engine:
                share = selection_share(subject.model, prompt, method)
                shares.append({"method": method.label, "batch": batch, "share of prefill": share})
        part.log(f"profiled batch {batch}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    part.extra["one decode step, by the profiler"] = [
        {name: row.get(name, 0.0) for name in names} for row in rows
    ]
    part.extra["selection, share of the prefill's kernel time"] = shares


def graphs(part: Part) -> None:
    """Compiled decode steps, untrimmed and trimmed, beside the usual ones."""
    subject = part.subject()
    bandwidth = read_bandwidth(part.device)
    policies = [NoTrim(), parse(part.policy)]
    rows = part.extra["decode steps in one graph"] = []
    for batch in part.given.batch[:2]:
        if not part.enough_time(f"graphs at batch {batch}", 150):
            continue
        workload = part.workload(subject, batch, part.given.repeats or 3)
        usual = run(subject, workload, part.core(), bandwidth=bandwidth, prefills=False)
        part.results.append(usual)
        for found in compiled_decode(subject, workload, policies, part.given.compile):
            label = found.label if found.label != "none" else own_cache().label
            eager = next(row for row in usual.rows if row.label == label)
            rows.append(
                {
                    "method": label,
                    "batch": batch,
                    "TPOT usual, ms": 1e3 * sorted(eager.tpot)[len(eager.tpot) // 2],
                    "TPOT compiled, ms": 1e3 * found.tpot,
                    "compiled / time to read its bytes": found.over_bound(bandwidth),
                }
            )
        part.log(f"graphs at batch {batch}")
        part.write()


RUN: dict[str, Callable[[Part], None]] = {
    "latency": latency,
    "throughput": throughput,
    "graphs": graphs,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--part", type=int, choices=range(1, len(PARTS) + 1), metavar="N")
    parser.add_argument("--shape", choices=SHAPES, help="another shape, in place of the part's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, help="rounds of everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, help="largest batch that is tried")
    parser.add_argument("--compile", default="reduce-overhead", help="torch.compile's mode")
    parser.add_argument("--budget", type=float, default=480, help="seconds for new measurements")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.list or given.part is None:
        for number, (shape, kind) in enumerate(PARTS, 1):
            print(f"{number:2d}  {kind:10s}  {shape}")
        return
    shape, kind = PARTS[given.part - 1]
    try:
        part = Part(
            given, given.shape or shape, kind, device_of(given.device), Deadline(given.budget)
        )
        RUN[kind](part)
        part.write()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    part.log("done")


if __name__ == "__main__":
    main()
