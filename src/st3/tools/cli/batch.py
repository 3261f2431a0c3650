"""`st3 batch`: answer the rows of a file or the images of a folder, here or on Ray."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import (
    BUNDLED_MODEL,
    CliError,
    print_json,
    printable,
    read_policy,
    stderr,
    stdout,
)
from st3.tools.cli._options import (
    AsJson,
    Attention,
    BatchSize,
    Budget,
    Device,
    DeviceMap,
    DType,
    MaxNewTokens,
    Model,
    PolicyName,
    Precision,
    Revision,
    System,
    Threads,
    TrustRemoteCode,
)
from st3.tools.common.errors import first_line

if TYPE_CHECKING:
    from st3.tools.batch import Done


def batch(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A .jsonl or .parquet file, or a folder.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where answers go; resumes a run.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="For rows without one, and for folders.")
    ] = None,
    system: System = None,
    model: Model = None,
    revision: Revision = None,
    policy: PolicyName = DEFAULT_POLICY,
    budget: Budget = None,
    batch_size: BatchSize = 8,
    window: Annotated[
        int | None, typer.Option(min=1, help="Rows sorted by length together. Default: 8 batches.")
    ] = None,
    max_new_tokens: MaxNewTokens = 200,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster, or `local` to start one.")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Models on Ray. Default: one for each GPU; 1 without GPUs."),
    ] = None,
    gpus_per_replica: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs of a model on Ray; more than 1 with --device-map. "
                     "Default: 1."),
    ] = None,
    as_json: AsJson = False,
    attention: Attention = None,
    threads: Threads = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Precision = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Answer many prompts about images, and go on where a killed run stopped.

    Each row of the input has an "image" (a path or a data URL) and, if it has them, an "id" and a
    "prompt". DIR receives answers-*.jsonl, errors.jsonl and summary.json.

    [bold]Examples[/bold]

    st3 batch photos/ --out answers/ -p "describe the image in detail."

    st3 batch rows.jsonl --out answers/ -m ./llava-1.5-7b-hf --policy st3-7b --batch 16

    st3 batch rows.parquet --out answers/ -m ./llava-1.5-7b-hf --ray auto --replicas 8
    """
    if ray is None and (replicas is not None or gpus_per_replica is not None):
        raise CliError("--replicas and --gpus-per-replica need --ray", 2)
    if prompt is not None and not prompt.strip():
        raise CliError("the prompt is empty: say what to answer with -p", 2)
    with stderr().status("importing torch and transformers"):
        from st3.tools.batch import BatchError, Options, run
        from st3.tools.batch.run import here
        from st3.tools.cli import _loading
    chosen = read_policy(policy, budget)
    options = Options(
        input=source.expanduser().absolute(),
        prompt=prompt,
        system=system,
        model=BUNDLED_MODEL if model is None else model + (f"@{revision}" if revision else ""),
        policy=chosen,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        window=8 * batch_size if window is None else window,
    )
    load = functools.partial(
        _loading.load,
        model,
        device,
        dtype.value,
        trust_remote_code,
        device_map=device_map,
        attention=attention,
        threads=threads,
        revision=revision,
    )
    try:
        execute: Any = here
        if ray is not None:
            from st3.tools.batch.ray import on_ray

            execute = on_ray(ray, replicas, gpus_per_replica)
        with _ends_on_request(), _Progress() as progress, _loading.quiet():
            summary = run(
                options, load, out.expanduser(), execute, progress.start, progress.advance
            )
    except BatchError as error:
        raise CliError(first_line(error), 2) from error
    except OSError as error:
        why = f"{error.filename or out}: {error.strerror or first_line(error)}"
        raise CliError(f"{why} (run the same command again to go on)") from error
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise CliError(f"{first_line(error)} (run the same command again to go on)") from error
    if as_json:
        print_json(summary)
    else:
        _print(summary, printable(out))
    if not summary["answered"]:
        raise CliError(f"no row could be answered: see {out / 'errors.jsonl'}")


@contextlib.contextmanager
def _ends_on_request() -> Iterator[None]:
    """SIGTERM, as job schedulers send it, ends a run as Ctrl-C does: what is answered is kept."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Progress(contextlib.ExitStack):
    """A bar with rows done, rows a second, the rest of the time, and the errors so far."""

    def start(self, total: int, before: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = self.enter_context(Progress(*columns, console=stderr(), transient=True))
        self.task = self.bar.add_task("loading the model", total=total, completed=before)
        self.errors = 0

    def advance(self, done: Done) -> None:
        self.errors += len(done.errors)
        self.bar.update(
            self.task,
            advance=len(done.answers) + len(done.errors),
            description=f"{self.errors} errors" if self.errors else "",
        )


def _print(summary: dict[str, Any], out: str) -> None:
    this, console = summary["this_run"], stdout()
    before = f" ({this['answered_before']} before)" if this["answered_before"] else ""
    console.print(
        f"{summary['answered']} of {summary['rows']} rows answered{before}, "
        f"{summary['errors']} errors, in {out}",
        soft_wrap=True,
    )
    if this["stale"]:
        console.print(
            f"{this['stale']} answers were to rows that have changed or are gone: see "
            f"{out}/stale.jsonl",
            soft_wrap=True,
        )
    if this["images_per_s"]:
        console.print(
            f"{this['images_per_s']:.2f} images/s, {this['tokens_per_s']:.1f} tokens/s over "
            f"{this['seconds']:.1f} s, loading not counted",
            soft_wrap=True,
        )
    if summary["mean_kv_saved"] is not None:
        console.print(f"KV saved: {summary['mean_kv_saved']:.1%} (mean, {summary['policy']})")
