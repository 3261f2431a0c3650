"""`st3 tune`: which policy at which budget suits a model and its work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.tools.cli._common import (
    BUNDLED_MODEL,
    CliError,
    listed,
    print_json,
    printable,
    stderr,
    stdout,
)
from st3.tools.cli._options import (
    AsJson,
    Attention,
    BatchSize,
    Device,
    DType,
    Model,
    PoliciesOrAll,
    Precision,
    Revision,
    Threads,
    TrustRemoteCode,
)
from st3.tools.common.errors import first_line

if TYPE_CHECKING:
    from st3.tools.tune.tuning import Outcome, Tuning


class Aim(StrEnum):
    """What is to be saved."""

    end_to_end = "end-to-end"
    prefill = "prefill"
    memory = "memory"


def tune(
    model: Model = None,
    revision: Revision = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL", help="Images and questions, with answers or without. "
            "Default for the bundled model: its drawn scenes.",
        ),
    ] = None,
    goal: Annotated[
        str, typer.Option(metavar="SHARE", help="How much is to be kept.")
    ] = "98% of answers",
    aim: Annotated[Aim, typer.Option("--for", help="What is to be saved.")] = Aim.end_to_end,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE.json", help="The policy; a page beside it."),
    ] = Path("policy.json"),
    sure: Annotated[
        bool, typer.Option("--sure", help="Take only what meets the goal with 95 % certainty.")
    ] = False,
    policies: PoliciesOrAll = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="S,S,...",
                     help="Mean visual shares. Default: 70%,50%,35%,25%,15%."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="N items. Default: all; of the drawn scenes 40."),
    ] = None,
    batch: BatchSize = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Longest answer. Default: 16; 160 for descriptions; 64 without "
                     "labels."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed; policies take turns in each.")] = 5,
    seed: Annotated[int, typer.Option(help="Of how items are dealt to the halves.")] = 0,
    as_json: AsJson = False,
    attention: Attention = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Find the policy and budget that saves most and keeps the answers, with evidence.

    Without --policies every method of st3 is tried. Candidates are narrowed down on one half of the
    items, the finalists are timed, and the cheapest one that meets the goal is confirmed on the
    other half. FILE.json can be given wherever a policy can; beside it lie the page (.html), the
    table (.md) and a folder (.run) from which a killed run goes on, and a run with another goal
    starts.

    [bold]Examples[/bold]

    st3 tune

    st3 tune -m ./llava-1.5-7b-hf --data my.jsonl --goal "98% of answers" --for memory

    st3 generate photo.png -p "what is on the table?" --policy policy.json
    """
    start = time.perf_counter()
    if data is None and model not in (None, BUNDLED_MODEL):
        raise CliError(
            "--data says on what to tune: a JSONL file with an image and a question a line, "
            'such as {"image": "a.jpg", "question": "what is this?"}, and an answer if known', 2,
        )  # fmt: skip
    _check_out(out)
    console = stderr()
    with console.status("importing torch and transformers"):
        from st3.models import find_parts, model_facts
        from st3.tools.cli import _loading
        from st3.tools.tune import Candidates, Tuning, questions, read_goal, sources, write
    with _one_line_errors(2):
        share = read_goal(goal)
        shares = _budgets(budgets)
        chosen = sources(listed(policies, ["all"]))
        given = questions(data, limit, seed)
    name = None if model == BUNDLED_MODEL else model
    with console.status(f"loading {model or 'the bundled model'}"):
        loaded = _loading.load(
            name, device, dtype.value, trust_remote_code,
            attention=attention, threads=threads, revision=revision,
        )  # fmt: skip
    with _one_line_errors(1):
        with _loading.quiet():
            layers = len(find_parts(loaded.model).layers)
            candidates = Candidates(loaded.model, layers, chosen)
        settings = _settings(loaded.model, given, max_new_tokens, limit, seed)
        from st3.tools.eval import Store

        work = Tuning(
            loaded.model, loaded.processor, given, candidates,
            Store(out.with_suffix(".run"), settings), share, aim.value, shares, sure, batch,
            max_new_tokens, rounds,
        )  # fmt: skip
        for note in given.notes:
            console.print(f"note: {note}", soft_wrap=True)
        with _loading.quiet():
            outcome = _run(work)
        about = _about(loaded, data, given, start, attention or "sdpa")
        files = write(out, outcome, work, model_facts(loaded.model.config), about)
    if as_json:
        from st3.tools.tune.report import sentence

        pick = outcome.pick
        print_json(
            {
                "policy": "none" if pick is None else pick.entry.label,
                "outcome": "untrimmed" if pick is None else "pick",
                "summary": sentence(outcome, work),
                "files": [str(path) for path in files],
            }
        )
    else:
        _show(outcome, work, files)


def _check_out(out: Path) -> None:
    if out.suffix != ".json":
        raise CliError(f"--out {out}: the name must end in .json", 2)
    if not out.parent.is_dir():
        raise CliError(f"--out {out}: there is no folder {str(out.parent)!r}", 2)


def _budgets(text: str | None) -> list[float]:
    from st3.methods.policies import read_budget
    from st3.tools.tune import BUDGETS

    if text is None:
        return list(BUDGETS)
    shares = [read_budget(part) for part in text.split(",")]
    if bad := [share for share in shares if not 0 < share < 1]:
        raise ValueError(f"budget {bad[0]:g} is no share to try: give some above 0, below 100%")
    return shares


def _settings(
    model: Any, given: Any, max_new_tokens: int | None, limit: int | None, seed: int
) -> dict[str, Any]:
    """What the answers in a run's folder depend on."""
    from st3.tools.common.conditions import versions
    from st3.tools.eval import fingerprint

    return {
        "model": fingerprint(model),
        "data": given.data.fingerprint(),
        "labels": given.labelled,
        "max_new_tokens": max_new_tokens,
        "limit": limit,
        "seed": seed,
        "dtype": str(model.dtype),
        "device": model.device.type,
        **{key: version for key, version in versions().items() if key != "python"},
    }


def _about(
    loaded: Any, data: Path | None, given: Any, start: float, attention: str
) -> dict[str, Any]:
    from st3.tools.common.conditions import conditions

    return conditions(loaded.model.device, loaded.model.dtype, attention) | {
        "model": loaded.name,
        "data": "the bundled scenes" if data is None else str(data),
        "items": len(given.data.items),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _run(work: Tuning) -> Outcome:
    """The outcome, with a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("searching", total=work.steps())
        work.on_step = lambda what, count: progress.update(
            task, advance=count, description=what[:48]
        )
        return work.run()


def _show(outcome: Outcome, work: Tuning, files: list[Path]) -> None:
    from st3.tools.common import tables
    from st3.tools.tune.report import HEAD, notes, rows, sentence

    console = stdout()
    cut = [name for name in HEAD if name not in ("mean share", "kept, searching half")]
    places = [HEAD.index(name) for name in cut]
    cells = [[row[place] for place in places] for row in rows(outcome)]
    console.print(tables.console(cut, cells, left=(0, len(cut) - 1), fold=(0, len(cut) - 1)), "")
    console.print(notes(outcome, work), "", style="dim", markup=False)
    console.print(sentence(outcome, work), soft_wrap=True, markup=False)
    written = ", ".join(printable(path) for path in files)
    console.print(f"written: {written}", soft_wrap=True, markup=False)


@contextlib.contextmanager
def _one_line_errors(code: int) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise CliError(first_line(error), code) from error
