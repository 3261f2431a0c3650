"""The CPU table: prefill, decode, captions and ragged batches of a 24-layer model, one thread.

    python benchmarks/cpu.py            # everything; hours
    python benchmarks/cpu.py --quick    # the important parts; about a quarter of an hour
    python benchmarks/cpu.py --sections prefill idle --dtypes bfloat16

Weights are random (shape cpu-308m: 24 layers, d 1024). Results go to benchmarks/results as JSON and
Markdown after each section, so that an interrupted run leaves what it has. Let nothing else run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from st3.methods import DEFAULT_POLICY
from st3.tools.bench import (
    GROUPED,
    SHAPES,
    Method,
    Result,
    Subject,
    Workload,
    attached,
    compare,
    from_shape,
    own_cache,
    run,
    steps_of,
    untouched,
)
from st3.tools.bench.bars import Bar
from st3.tools.bench.bars import as_markdown as bars_table
from st3.tools.bench.files import save
from st3.tools.bench.overhead import copying_share
from st3.tools.bench.prompts import build
from st3.tools.bench.ragged import RaggedRow, against_uniform
from st3.tools.common.conditions import conditions
from st3.tools.common.load import dtype_of
from st3.tools.common.memory import keep_freed_memory
from st3.tools.common.tables import markdown

RESULTS = Path(__file__).with_name("results")
CPU = torch.device("cpu")
FEW, MANY = 576, 2880  # visual tokens: one image of LLaVA-1.5, five crops of LLaVA-NeXT


@dataclasses.dataclass
class Session:
    """Options, models and what was found so far."""

    given: argparse.Namespace
    console: Console
    results: list[Result] = dataclasses.field(default_factory=list)
    ragged: list[tuple[str, list[RaggedRow]]] = dataclasses.field(default_factory=list)
    bars: list[Bar] = dataclasses.field(default_factory=list)
    subjects: dict[str, Subject] = dataclasses.field(default_factory=dict)
    bandwidth: float | None = None
    keeps_memory: bool = False

    def subject(self, dtype: str, shape: str | None = None) -> Subject:
        shape = shape or self.given.shape
        key = f"{shape}, {dtype}"
        if key not in self.subjects:
            found = from_shape(shape, CPU, dtype_of(dtype))
            self.subjects[key] = dataclasses.replace(found, name=key)
        return self.subjects[key]

    def workload(self, visual: int, **more: Any) -> Workload:
        few = self.given.visual
        images = 1 if visual == FEW else MANY // FEW
        tokens = visual if few is None else few * images
        return Workload(visual=tokens, text=64, images=images, **more)

    def run(
        self,
        dtype: str,
        workload: Workload,
        methods: list[Method],
        prefills: bool = True,
        shape: str | None = None,
    ) -> Result:
        subject = self.subject(dtype, shape)
        with Progress(console=self.console, transient=True) as progress:
            title = f"{subject.name}: {workload.title}"
            task = progress.add_task(title, total=steps_of(workload, methods, prefills))
            result = run(
                subject,
                workload,
                methods,
                lambda what: progress.update(task, advance=1, description=f"{title}: {what}"),
                bandwidth=self.bandwidth,
                prefills=prefills,
            )
        self.bandwidth = result.bandwidth or self.bandwidth
        self.results.append(result)
        self.console.print(f"done: {title}")
        return result

    def lengths(self, *usual: int) -> list[int]:
        """Visual tokens of a section: the usual ones, unless others are asked for."""
        return self.given.lengths or list(usual)

    def bar(self, name: str, measured: float | None, goal: float, at_most: bool = False) -> None:
        self.bars.append(Bar(name, measured, goal, at_most))

    def write(self) -> None:
        name = "cpu-quick" if self.given.quick else "cpu"
        if self.given.sections != list(SECTIONS):
            name += "-" + "-".join(self.given.sections)
        name += "".join(f"-{visual}" for visual in self.given.lengths or ())
        where = conditions(CPU, dtype_of(self.given.dtypes[0]))
        where["dtype"] = " and ".join(self.given.dtypes)
        where["freed_memory"] = (
            "kept by the process" if self.keeps_memory else "the C library's way"
        )
        page = save(self.results, where, self.given.out, name, plots=not self.given.no_plots)[1]
        page.write_text(
            page.read_text() + "\n## Goals\n\n" + bars_table(self.bars) + self._ragged()
        )
        extra = [dataclasses.asdict(bar) | {"met": bar.met} for bar in self.bars]
        rows = [{title: [dataclasses.asdict(row) for row in rows]} for title, rows in self.ragged]
        text = json.dumps({"goals": extra, "ragged": rows}, indent=1) + "\n"
        (self.given.out / f"{name}-goals.json").write_text(text)

    def _ragged(self) -> str:
        text = ""
        for title, rows in self.ragged:
            head = ("method", "prefill, ragged / uniform", "generation")
            cells = [
                [row.label, *(f"{row.slower(part) or 0:.3f}" for part in ("first", "total"))]
                for row in rows
            ]
            text += f"\n## Ragged against uniform: {title}\n\n{markdown(head, cells)}\n"
        return text


def own(policy: str) -> list[Method]:
    """The method of a policy, on st3's engine."""
    return compare([policy], peers=False)[2:]


def prefill(session: Session) -> None:
    """Every method at both lengths; the quick table has all of them only at 576 tokens in bf16."""
    quick = session.given.quick
    some = [untouched(), *own(session.given.policy), *own("fastv")]
    every = [attached(), *compare([session.given.policy])]
    every.sort(key=lambda method: method.label != untouched().label)
    for dtype in session.given.dtypes:
        for visual in session.lengths(FEW, MANY):
            if quick and visual == MANY and dtype != session.given.dtypes[0]:
                continue
            brief = quick and (visual == MANY or dtype != session.given.dtypes[0])
            rounds = session.given.repeats or (4 if quick else 9)
            layers = session.given.layer_rounds if not (quick and visual == MANY) else 5
            workload = session.workload(visual, new_tokens=0, repeats=rounds, layer_rounds=layers)
            result = session.run(dtype, workload, some if brief else every)
            _prefill_bars(session, result, dtype, visual)


def _prefill_bars(session: Session, result: Result, dtype: str, visual: int) -> None:
    labels = {own(session.given.policy)[0].label: 0.98 if visual == FEW else 1.1}
    labels[own("fastv")[0].label] = 1.0
    for row in result.rows:
        if row.label not in labels:
            continue
        gain, where = result.ratio(row, "prefill"), f"{row.label}, {visual} visual tokens, {dtype}"
        over = gain.paired / row.flops_ratio if gain and row.flops_ratio else None
        session.bar(f"prefill speed-up / FLOPs ratio: {where}", over, labels[row.label])
        share = row.overhead.share if row.overhead else None
        session.bar(f"selection, share of the prefill: {where}", share, 0.015, at_most=True)


def idle(session: Session) -> None:
    """Attached, but dropping nothing. Half a per cent is asked for, and on a shared machine a
    round's ratio is off by ten, hence so many rounds."""
    rounds = session.given.repeats or 40
    dtype = session.given.dtypes[0]
    workload = session.workload(FEW, new_tokens=0, repeats=rounds)
    result = session.run(dtype, workload, [untouched(), attached()])
    gain = result.ratio(result.rows[1], "prefill")
    slower = abs(1 / gain.paired - 1) if gain else None
    session.bar(f"attached, drops nothing: change of the prefill, {dtype}", slower, 0.005, True)


def decode(session: Session) -> None:
    """Steps against their bound. (Batch 8 at 576 tokens is in the captions, too.)"""
    quick, dtype = session.given.quick, session.given.dtypes[0]
    methods = [untouched(), own_cache(), *own(session.given.policy)]
    for batch in (1,) if quick else (1, 8):
        for visual in session.lengths(FEW, MANY):
            rounds = session.given.repeats or (3 if quick else 5)
            workload = session.workload(visual, batch=batch, new_tokens=32, repeats=rounds)
            result = session.run(dtype, workload, methods, prefills=False)
            _bound_bars(session, result)


def _bound_bars(session: Session, result: Result) -> None:
    for row in result.rows[1:]:
        name = f"decode step / bound: {row.label}, {result.workload.title}"
        session.bar(name, result.over_bound(row), 1.08, at_most=True)


def caption(session: Session) -> None:
    """Batch 8, 128 new tokens; 2,880 visual tokens in the full table alone."""
    quick, dtype = session.given.quick, session.given.dtypes[0]
    for visual in session.lengths(FEW) if quick else session.lengths(FEW, MANY):
        goal = 2.3 if visual == FEW else 3.3
        methods = [
            untouched(),
            own_cache(),
            *own(session.given.caption_policy),
        ]
        rounds = session.given.repeats or (1 if quick else 3)
        workload = session.workload(
            visual, batch=8, new_tokens=session.given.caption_tokens, repeats=rounds
        )
        result = session.run(dtype, workload, methods, prefills=False)
        _bound_bars(session, result)
        row, base = result.rows[-1], result.reference.footprint
        gain, held = result.ratio(row, "total"), row.footprint
        title = result.workload.title
        session.bar(f"end to end: {row.label}, {title}", gain.paired if gain else None, goal)
        for name in ("kv_live", "kv_allocated"):
            share = sum(getattr(held, name)) / sum(getattr(base, name)) if held and base else None
            session.bar(f"{name}, mean over untrimmed: {row.label}, {title}", share, 0.3, True)
        subject = session.subject(dtype)
        prompt = build(workload.rows(), subject.vocab, subject.device)
        copied = copying_share(subject.model, prompt, methods[-1], workload.new_tokens)
        session.bar(f"copying buffers, share of steps: {row.label}, {title}", copied, 0.01, True)


def ragged(session: Session) -> None:
    """Rows of different lengths against uniform ones of the same columns."""
    quick, dtype = session.given.quick, session.given.dtypes[0]
    rounds = session.given.repeats or (2 if quick else 5)
    workload = session.workload(FEW, batch=2 if quick else 8, new_tokens=8, repeats=rounds)
    workload = dataclasses.replace(workload, images=1)
    methods = [untouched(), *own(session.given.policy)]
    rows = against_uniform(session.subject(dtype), workload, methods)
    session.ragged.append((f"{workload.title}, {dtype}", rows))
    for row in rows:
        name = f"ragged / uniform, {workload.title}: {row.label}"
        session.bar(name, row.slower("total"), 1.1, at_most=True)


def grouped(session: Session) -> None:
    """Models with grouped queries, as most have: prefill, and decode steps, of which none may take
    longer than the untouched model's."""
    quick, dtype = session.given.quick, session.given.dtypes[0]
    methods = [untouched(), own_cache(), *own(session.given.policy)]
    for shape in session.given.grouped_shapes:
        rounds = session.given.repeats or (3 if quick else 9)
        workload = session.workload(FEW, new_tokens=0, repeats=rounds)
        result = session.run(dtype, workload, methods, shape=shape)
        _prefill_bars(session, result, f"{dtype}, {shape}", FEW)
        for batch in (2,) if quick else (1, 2):
            for visual in session.lengths(MANY) if quick else session.lengths(FEW, MANY):
                rounds = session.given.repeats or (3 if quick else 5)
                workload = session.workload(visual, batch=batch, new_tokens=32, repeats=rounds)
                result = session.run(dtype, workload, methods, prefills=False, shape=shape)
                for row in result.rows[1:]:
                    gain = result.ratio(row, "tpot")
                    name = f"decode step / untouched: {row.label}, {shape}, {workload.title}"
                    session.bar(name, 1 / gain.paired if gain else None, 1.0, at_most=True)


SECTIONS: dict[str, Callable[[Session], None]] = {
    f.__name__: f for f in (prefill, idle, decode, grouped, caption, ragged)
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="15 minutes in place of hours")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--lengths", nargs="+", type=int, choices=(FEW, MANY), metavar="TOKENS")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    parser.add_argument(
        "--caption-policy",
        default="balanced:first_drop=0.87,tau=128,floor=0.08",
        help="for captions: 13 %% after the first layer, annealed to 8 %%",
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu-308m")
    parser.add_argument(
        "--grouped-shapes", nargs="*", choices=SHAPES, default=list(GROUPED), metavar="SHAPE",
        help="shapes with grouped queries",
    )  # fmt: skip
    parser.add_argument("--visual", type=int, help="visual tokens of one image, in place of 576")
    parser.add_argument("--caption-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, help="rounds of everything")
    parser.add_argument(
        "--layer-rounds", type=int, default=20, help="rounds of the prefill beside bare layers"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    session = Session(given, Console(stderr=True), keeps_memory=keep_freed_memory())
    try:
        for name in given.sections:
            SECTIONS[name](session)
            session.write()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(bars_table(session.bars))


if __name__ == "__main__":
    main()
