"""The GPU table in parts of at most nine minutes each: bf16, random weights.

    PYTHONPATH=src python benchmarks/gpu.py --list
    PYTHONPATH=src python benchmarks/gpu.py --part 1 --out results

Needs Python 3.11 or newer, torch, transformers, typer and rich; matplotlib for pictures, flash_attn
for its rows. st3 need not be installed. Each part writes its JSON and Markdown to --out as soon as
it has something.

latency: prefill, TTFT and TPOT at batch 1, 8 and 32 and 576 and 2,880 visual tokens, with sdpa and,
where it is installed, flash attention; what of the prefill's gain is possible. lengths: the same of
prompts whose length was never seen before, as a server meets them. profile: what the profiler says
of prefills, decode steps and the selection. throughput: the largest batch that fits and its tokens
per second. graphs: decode steps compiled into CUDA graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from st3.methods import DEFAULT_POLICY
from st3.methods.policies import NoTrim
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
)
from st3.tools.bench.bound import read_bandwidth
from st3.tools.bench.capacity import measure_capacity
from st3.tools.bench.compiled import compiled_decode
from st3.tools.bench.files import save
from st3.tools.bench.measure import Generation, generation
from st3.tools.bench.profile import profile_decode, profile_prefill, selection_share
from st3.tools.bench.prompts import Row, build
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
KINDS = ("latency", "lengths", "profile", "throughput", "graphs")
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

    def workload(
        self, subject: Subject, batch: int, repeats: int, visual: int | None = None
    ) -> Workload:
        """As many visual tokens as the shape has, in as many images; or ``visual``, in one."""
        own = visual is None or visual == subject.visual_tokens
        return Workload(
            batch=batch,
            visual=subject.visual_tokens if visual is None else visual,
            text=subject.text_tokens,
            images=subject.images if own else 1,
            new_tokens=self.given.new_tokens,
            repeats=repeats,
            layer_rounds=self.given.layer_rounds if self.kind == "latency" else 0,
        )

    def visual(self, subject: Subject) -> list[int]:
        """Visual tokens of a prompt, one workload after the other."""
        return self.given.visual or sorted({subject.visual_tokens, 2880})

    def methods(self) -> list[Method]:
        """The references, the shape's policy, the default, and what else was asked for."""
        names = dict.fromkeys([self.policy, DEFAULT_POLICY, *self.given.policies])
        return compare(list(names), peers=False)

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
        where["commit"] = self.given.commit or where["commit"]
        name = "-".join(["gpu", self.shape, self.kind, *self.given.suffix])
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
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(rows[0]) if rows else []
    cells = [[show(value) for value in row.values()] for row in rows]
    return f"\n## {title}\n\n{markdown(names, cells, left=range(len(names)))}\n"


def latency(part: Part) -> None:
    """Every method at each number of visual tokens and each batch."""
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
            for visual in part.visual(subject):
                workload = part.workload(subject, batch, part.given.repeats or 5, visual)
                if part.enough_time(f"{workload.title}, {attention}", 30):
                    _measure(part, subject, workload, bandwidth)
        del subject
        _free(part.device)


def _measure(part: Part, subject: Subject, workload: Workload, bandwidth: float) -> None:
    """One workload; with less where that is all that the memory holds."""
    methods = part.methods()
    while methods:
        try:
            found = run(subject, workload, methods, deadline=part.deadline, bandwidth=bandwidth)
        except torch.OutOfMemoryError:
            left_out = methods.pop(0)
            part.notes.append(f"out of memory: {workload.title}, {left_out.label}")
            part.log(part.notes[-1])
            _free(part.device)
            continue
        part.results.append(found)
        part.log(workload.title)
        part.write()
        return


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lengths(part: Part) -> None:
    """Each method answers prompts of lengths that no method met before, one prompt at a time."""
    subject, prompts = part.subject(), part.given.prompts
    methods, text = part.methods(), itertools.count(subject.text_tokens + 1)
    for visual in part.visual(subject):
        seen: dict[str, list[Generation]] = {method.label: [] for method in methods}
        for _ in range(prompts + 1):
            for method in methods:
                prompt = build([Row(next(text), (visual,))], subject.vocab, subject.device)
                with method.attach(subject.model, prompt):
                    found = generation(subject.model, prompt, part.given.new_tokens)
                seen[method.label].append(found)
        part.log(f"new lengths, {visual} visual tokens")
        part.extra[f"lengths not seen before, batch 1, {visual} visual tokens"] = [
            {
                "method": label,
                "prompts": prompts,
                "first token, ms": 1e3 * statistics.median(one.first for one in found[1:]),
                "TPOT, ms": 1e3 * statistics.median(s for one in found[1:] for s in one.steps),
                "TPOT, mean, ms": 1e3 * statistics.mean(s for one in found[1:] for s in one.steps),
                "end to end, ms": 1e3 * statistics.median(one.total for one in found[1:]),
            }
            for label, found in seen.items()
        ]
        part.write()


def profiles(part: Part) -> None:
    """What the profiler says, at two batches."""
    subject = part.subject()
    for visual in part.visual(subject):
        _profiles(part, subject, visual)
        part.write()


def throughput(part: Part) -> None:
    """Largest batch, and tokens per second there."""
    subject = part.subject()
    workload = part.workload(subject, 1, part.given.repeats or 2, part.visual(subject)[-1])
    limit = part.given.limit or (4096 if part.device.type == "cuda" else 8)
    rows = measure_capacity(subject, workload, part.methods(), None, part.deadline, limit)
    base = rows[0]
    part.extra[f"largest batch, {workload.visual} visual tokens"] = [
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


def _profiles(part: Part, subject: Subject, visual: int) -> None:
    """One step's waits and kernels at two batches; the selection's share of kernel time."""
    rows, prefills = [], []
    layers = subject.text_config.num_hidden_layers
    for batch in part.given.batch[:2]:
        rows_of_prompt = part.workload(subject, batch, 1, visual).rows()
        prompt = build(rows_of_prompt, subject.vocab, subject.device)
        for method in part.methods():
            seen = profile_decode(subject.model, prompt, method, 2, 5)
            most = max(seen.waits.values())
            row = {"method": method.label, "batch": batch}
            row |= {name: count for name, count in seen.waits.items() if count or "Stream" in name}
            row |= {"wait in each layer": most >= layers, "launches": seen.launches}
            rows.append(row | {"kernel time, ms": 1e3 * seen.busy})
            share = 0.0
            if method.own_engine:
                share = selection_share(subject.model, prompt, method)
            once = profile_prefill(subject.model, prompt, method)
            prefills.append(
                {
                    "method": method.label,
                    "batch": batch,
                    "time, ms": 1e3 * once.seconds,
                    "kernel time, ms": 1e3 * once.busy,
                    "launches": once.launches,
                    "waits": max(once.waits.values()),
                    "selection, share of kernel time": share,
                }
            )
        part.log(f"profiled batch {batch}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    part.extra[f"one decode step, by the profiler, {visual} visual tokens"] = [
        {name: row.get(name, 0.0) for name in names} for row in rows
    ]
    part.extra[f"one prefill, by the profiler, {visual} visual tokens"] = prefills


def graphs(part: Part) -> None:
    """Compiled decode steps, untrimmed and trimmed, beside the usual ones."""
    subject = part.subject()
    bandwidth = read_bandwidth(part.device)
    policies = [method.policy or NoTrim() for method in part.methods()[1:]]
    rows = part.extra["decode steps in one graph"] = []
    workloads = [
        part.workload(subject, batch, part.given.repeats or 3, visual)
        for batch in part.given.batch[:2]
        for visual in part.visual(subject)
    ]
    for workload in workloads:
        if not part.enough_time(f"graphs: {workload.title}", 60):
            continue
        usual = run(subject, workload, part.methods(), bandwidth=bandwidth, prefills=False)
        part.results.append(usual)
        compiled = compiled_decode(subject, workload, policies, _options(part.given.compile))
        by_label = {one.label.replace("none", own_cache().label): one for one in compiled}
        for row in usual.rows:
            found = by_label.get(row.label)
            rows.append(
                {
                    "method": row.label,
                    "batch": workload.batch,
                    "visual": workload.visual,
                    "TPOT usual, ms": 1e3 * statistics.median(row.tpot),
                    "TPOT compiled, ms": 1e3 * found.tpot if found else None,
                    "compiled / time to read its bytes": found.over_bound(bandwidth)
                    if found
                    else None,
                }
            )
        part.log(f"graphs: {workload.title}")
        part.write()


def _options(text: str) -> str | dict[str, Any]:
    options: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
    return options or text


RUN: dict[str, Callable[[Part], None]] = {
    "latency": latency,
    "lengths": lengths,
    "profile": profiles,
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
    parser.add_argument("--visual", type=int, nargs="+", help="visual tokens of a prompt")
    parser.add_argument("--policies", nargs="*", default=["fastv"], help="beside shape and default")
    parser.add_argument("--layer-rounds", type=int, default=7, help="rounds of what is possible")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, help="rounds of everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=5, help="of each new length")
    parser.add_argument("--limit", type=int, help="largest batch that is tried")
    parser.add_argument(
        "--compile", default="graphs", help="compile_decode of st3.trim, or its options as JSON"
    )
    parser.add_argument("--commit", help="what this tree is a copy of, where git does not know")
    parser.add_argument("--budget", type=float, default=480, help="seconds for new measurements")
    parser.add_argument("--suffix", nargs="*", default=[], help="behind the names of the results")
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
