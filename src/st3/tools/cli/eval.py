"""`st3 eval`: what trimming costs in answers, against the untrimmed model and random choice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import CliError, listed, print_json, stderr, stdout
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
    System,
    Threads,
    TrustRemoteCode,
)
from st3.tools.common.errors import first_line

if TYPE_CHECKING:
    from st3.tools.eval import Dataset, Entry, Evaluation, Summary

DEFAULT_POLICIES = [DEFAULT_POLICY, "fastv", "vtw", "pyramiddrop"]


def evaluate(
    model: Model = None,
    revision: Revision = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR_OR_JSONL", help="Images and a JSONL of questions. Default: drawn scenes."
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Some of the set's tasks. Default: all.")
    ] = None,
    system: System = None,
    policies: PoliciesOrAll = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...",
            help="Set each policy to these mean visual shares, such as 20%,35%.",
        ),
    ] = None,
    half: Annotated[
        str | None,
        typer.Option(
            metavar="choose|report",
            help="One half of the images: choose settings on one, report on the other.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N items of each task.")
    ] = None,
    batch: BatchSize = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer. Default: 160 for descriptions, else 16."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR",
            help="Keep finished items, JSON, Markdown, PNG there; goes on from it.",
        ),
    ] = None,
    as_json: AsJson = False,
    attention: Attention = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Measure how much of the untrimmed model's answers each policy keeps.

    Without --policies: the default, fastv, vtw and pyramiddrop. The untrimmed model, random choice
    at each policy's counts, an even grid and the image made smaller are in every table.

    [bold]Examples[/bold]

    st3 eval --limit 10

    st3 eval --policies all --budgets 0.35,0.5 --out results

    st3 eval --half choose --policies balanced,balanced:stride=1

    st3 eval -m ./llava-1.5-7b-hf --data ./my-images --policies "st3-7b,fastv:drop=0.75"
    """
    shares = None if budgets is None else _shares(budgets)
    if out is not None and out.exists() and not out.is_dir():
        raise CliError(f"--out {out}: that is a file, name a folder", 2)
    console = stderr()
    with console.status("importing torch and transformers"):
        from st3.models import family_of
        from st3.tools.cli import _loading
        from st3.tools.common.conditions import conditions, versions
        from st3.tools.eval import (
            SEEDS,
            Evaluation,
            Store,
            entries,
            fingerprint,
            label_policies,
            summarise,
            to_dict,
            usable,
        )
    with _one_line_errors(2):
        chosen = label_policies(listed(policies, DEFAULT_POLICIES))
        questions = _questions(data, tasks, half, limit)
    with console.status(f"loading {model or 'the bundled model'}"):
        loaded = _loading.load(
            model, device, dtype.value, trust_remote_code,
            attention=attention, threads=threads, revision=revision,
        )  # fmt: skip
    with _one_line_errors(1):
        able, refused = usable(loaded.model, chosen)
        rows, notes = entries(able, shares, len(family_of(loaded.model).parts(loaded.model).layers))
        notes = refused + notes
        for note in notes:
            console.print(f"note: {note}", soft_wrap=True)
        given = conditions(loaded.model.device, loaded.model.dtype)
        settings = {
            "model": fingerprint(loaded.model),
            "data": questions.fingerprint(),
            "max_new_tokens": max_new_tokens,
            "dtype": str(loaded.model.dtype),
            "device": loaded.model.device.type,
            "engine": given["engine"],
            **({} if system is None else {"system": system}),
            **{key: version for key, version in versions().items() if key != "python"},
        }
        given |= {
            "model": loaded.name,
            "data": "the bundled scenes" if data is None else str(data),
            "half": half,
            "items": len(questions.items),
            "batch": batch,
            "seeds": SEEDS,
            **({} if system is None else {"system": system}),
        }
        work = Evaluation(
            loaded.model,
            loaded.processor,
            questions,
            rows,
            Store(out, settings),
            batch,
            max_new_tokens,
            system=system,
        )
        with _loading.quiet():
            records = _run(work)
        summary = summarise(questions, rows, records, notes)
    if as_json:
        print_json(to_dict(summary, given))
    else:
        _show(summary, given)
    if out is not None:
        _save(summary, given, rows, out)


def _shares(text: str) -> list[float]:
    from st3.methods.policies import read_budget

    try:
        shares = [read_budget(part) for part in text.split(",")]
    except ValueError as error:
        raise CliError(f"--budgets {text}: {first_line(error)}", 2) from error
    if bad := [share for share in shares if not 0 < share <= 1]:
        raise CliError(f"--budgets: {bad[0]:g} is no share: give numbers above 0, up to 1", 2)
    return shares


def _questions(
    data: Path | None, tasks: str | None, half: str | None, limit: int | None
) -> Dataset:
    from st3.tools.eval import bundled_scenes, load_folder

    found = bundled_scenes() if data is None else load_folder(data)
    found = found if half is None else found.half(half)
    return found.only(None if tasks is None else [t.strip() for t in tasks.split(",")], limit)


@contextlib.contextmanager
def _one_line_errors(code: int) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise CliError(first_line(error), code) from error


def _run(work: Evaluation) -> Any:
    """All records, with a progress bar on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    total = len(work.data.items) * len(work.entries)
    with Progress(*bars, console=stderr(), transient=True) as progress:
        task = progress.add_task("answering", total=total, completed=total - work.missing)
        work.on_items = lambda count, what: progress.update(
            task, advance=count, description=what[:48]
        )
        return work.run()


def _show(summary: Summary, given: dict[str, Any]) -> None:
    from rich.markup import escape

    from st3.tools.common.conditions import in_words
    from st3.tools.common.tables import console as table
    from st3.tools.eval.report import NOTES, tables

    console = stdout()
    for title, columns, rows in tables(summary, brief=True):
        console.print(f"[bold]{title}[/bold]\n")
        names, cells = [name for name, _ in columns], [[c(row) for _, c in columns] for row in rows]
        console.print(table(names, cells), "")
    console.print(escape(f"{' '.join(NOTES.split())}\n{in_words(given)}."), style="dim")


def _save(summary: Summary, given: dict[str, Any], rows: list[Entry], out: Path) -> None:
    import json
    from importlib.util import find_spec

    from st3.tools.eval import as_markdown, to_dict

    pictures: list[Path] = []
    with _one_line_errors(1):
        if len(rows) == 1:
            stderr().print("no pictures: there is only the untrimmed model")
        elif find_spec("matplotlib") is None:
            stderr().print("no pictures: matplotlib is missing, pip install 'st3[plot]'")
        else:
            from st3.tools.eval.plot import draw_all

            pictures = draw_all(summary, out, f"{given['model']}, {given['data']}")
        data, page = out / "quality.json", out / "quality.md"
        data.write_text(json.dumps(to_dict(summary, given), indent=1) + "\n", encoding="utf-8")
        text = as_markdown(summary, given, [picture.name for picture in pictures])
        page.write_text(text, encoding="utf-8")
    for path in (data, page, *pictures):
        stderr().print(f"written: {path}", soft_wrap=True)
