"""`st3 bench`: time, memory and FLOPs of trimming against the untouched model and other methods."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import (
    CliError,
    listed,
    print_json,
    read_policy,
    stderr,
    stdout,
)
from st3.tools.cli._options import AsJson, Budget, Device, Policies, Threads
from st3.tools.common.errors import first_line

if TYPE_CHECKING:
    from st3.tools.bench import Result, Subject, Workload

DEFAULT_SHAPE = "cpu-308m"


def bench(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", metavar="FOLDER", help="A saved model.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Random weights of a named shape (llava-1.5-7b ...). Default: {DEFAULT_SHAPE}.",
        ),
    ] = None,
    policies: Policies = None,
    budget: Budget = None,
    peers: Annotated[
        bool, typer.Option(help="Also random choice, a smaller image, FastV (both ways) and VTW.")
    ] = True,
    batch: Annotated[
        str, typer.Option(metavar="N,N,...", help="Batch sizes, one after the other.")
    ] = "1",
    visual: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens of a row. Default: the shape's.")
    ] = None,
    text: Annotated[
        int | None, typer.Option(min=2, help="Text tokens of a row. Default: the shape's.")
    ] = None,
    image_count: Annotated[
        int | None, typer.Option(min=1, help="Images that the visual tokens come from.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Length of every answer; 0: measure the prefill alone.")
    ] = 32,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Rows of different lengths and image counts.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed; methods take turns in each.")] = 5,
    layer_rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rounds that compare the prefill with the bare layers on as many columns: what is "
            "possible on this machine. 0: leave it out.",
        ),
    ] = 10,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.")
    ] = "bfloat16",
    attention: Annotated[
        str, typer.Option(metavar="KERNEL", help="sdpa, eager, flash_attention_2 ...")
    ] = "sdpa",
    threads: Threads = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Write JSON, Markdown and PNG there."),
    ] = None,
) -> None:
    """Measure trimming against the untouched model and against other methods, in one process.

    [bold]Examples[/bold]

    st3 bench --threads 1 --batch 1,8 --out results

    st3 bench --shape llava-1.5-7b --device cuda --max-new-tokens 128

    st3 bench --model ./llava-1.5-7b-hf --policies "st3-7b,fastv:layer=2,drop=0.75" --no-peers
    """
    if model is not None and shape is not None:
        raise CliError("--model and --shape exclude each other: give one of the two", 2)
    sizes = _batches(batch)
    console = stderr()
    with console.status("importing torch and transformers"):
        import torch

        from st3.tools import bench as measuring
        from st3.tools.common.conditions import conditions
        from st3.tools.common.load import device_of, dtype_of
    if threads is not None:
        torch.set_num_threads(threads)
    with _one_line_errors():
        names = listed(policies, [DEFAULT_POLICY])
        chosen = [read_policy(name, budget, "--policies") for name in names]
        methods = measuring.compare(chosen, peers)
        with console.status("making the model"):
            where, kind = device_of(device), dtype_of(dtype)
            subject = (
                measuring.from_shape(shape or DEFAULT_SHAPE, where, kind, attention)
                if model is None
                else measuring.from_folder(model, where, kind, attention)
            )
        workloads = [
            measuring.Workload(
                batch=size,
                visual=visual or subject.visual_tokens,
                text=text or subject.text_tokens,
                images=image_count or (subject.images if visual is None else 1),
                new_tokens=max_new_tokens,
                ragged=ragged,
                repeats=rounds,
                layer_rounds=layer_rounds,
            )
            for size in sizes
        ]
        given = conditions(where, kind, attention)
        results = _measured(subject, workloads, methods)
        if as_json:
            from st3.tools.bench.report import to_dict

            print_json(to_dict(results, given))
        else:
            _show(results, given)
        if out is not None:
            _save(results, given, out)


def _batches(text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[1-9]\d*\s*", part) for part in parts):
        raise CliError(f"--batch {text}: give numbers of at least 1 with commas, such as 1,8", 2)
    return [int(part) for part in parts]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Wrong arguments become one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        raise CliError(first_line(error), 2) from error


def _measured(subject: Subject, workloads: list[Workload], methods: Any) -> list[Result]:
    """All workloads, with a progress bar on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from st3.tools.bench import run, steps_of

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=stderr(), transient=True) as progress:
        bandwidth = None
        for workload in workloads:
            task = progress.add_task(workload.title, total=steps_of(workload, methods))

            def step(what: str, task: Any = task, title: str = workload.title) -> None:
                progress.update(task, advance=1, description=f"{title}: {what}")

            results.append(run(subject, workload, methods, step, bandwidth=bandwidth))
            bandwidth = results[-1].bandwidth
            progress.remove_task(task)
    return results


def _show(results: list[Result], given: dict[str, Any]) -> None:
    from st3.tools.bench.report import (
        BRIEF_ALONE,
        BRIEF_GAINS,
        MEMORY,
        NOTES,
        TIMES,
        cells,
        footnote,
    )
    from st3.tools.common import tables
    from st3.tools.common.conditions import in_words

    console = stdout()
    for result in results:
        console.print(f"[bold]{result.subject}: {result.workload.title}[/bold]\n")
        for columns in (TIMES, MEMORY, BRIEF_GAINS, BRIEF_ALONE):
            names, lines = cells(result, columns)
            if len(names) == 1:
                continue
            console.print(tables.console(names, lines), "")
        console.print(footnote(result), "", style="dim")
    console.print(f"{in_words(given)}.\n{' '.join(NOTES.split())}", style="dim")


def _save(results: list[Result], given: dict[str, Any], out: Path) -> None:
    from importlib.util import find_spec

    from st3.tools.bench.files import save

    plots = find_spec("matplotlib") is not None
    if not plots:
        stderr().print("no pictures: matplotlib is missing, pip install 'st3[plot]'")
    name = re.sub(r"[^\w.-]", "-", f"{results[0].subject}-{given['device']}-{given['dtype']}")
    try:
        written = save(results, given, out, name, plots)
    except OSError as error:
        raise CliError(f"--out {out}: {first_line(error)}") from error
    for path in written:
        stderr().print(f"written: {path}", soft_wrap=True)
