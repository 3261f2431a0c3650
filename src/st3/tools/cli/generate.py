"""`st3 generate`: answer a prompt about images, trimmed, and on request compared and drawn."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import (
    CliError,
    print_json,
    printable,
    read_policy,
    shown,
    stderr,
    stdout,
)
from st3.tools.cli._options import (
    AsJson,
    Attention,
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
    from PIL.Image import Image

    from st3.models.places import Place
    from st3.tools.cli._loading import Loaded

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def generate(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Image files, all shown in one prompt; - is stdin."),
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question or instruction.")],
    system: System = None,
    model: Model = None,
    revision: Revision = None,
    policy: PolicyName = DEFAULT_POLICY,
    budget: Budget = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer untrimmed as well, and time both.")
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Timed rounds with --compare, for medians. Default: 3."),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw which patches some layers kept."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="I,J,...", help="Layers to draw, from 0. Default: four that differ."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Record the run in this folder, for `st3 report RUN`."),
    ] = None,
    max_new_tokens: MaxNewTokens = 200,
    as_json: AsJson = False,
    attention: Attention = None,
    threads: Threads = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    tp: Annotated[
        int | None, typer.Option(min=2, help="Tensor parallel processes, started by torchrun.")
    ] = None,
    dtype: Precision = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer a prompt about one or more images, with visual tokens trimmed.

    [bold]Examples[/bold]

    st3 generate photo.png -p "describe the image in detail."

    st3 generate photo.png -p "what is at the top left?" --compare --heatmap kept.png

    st3 generate a.jpg b.jpg -p "compare the two." -m ./llava-1.5-7b-hf --policy fastv --budget 35%

    st3 generate photo.png -p "describe the image." --policy policy.json

    st3 generate photo.png -p "describe the image." --save run && st3 report run

    st3 generate photo.png -p "describe the image." --json --compare | jq .report.mean_share

    torchrun --nproc-per-node 2 -m st3.tools.cli generate photo.png -p "what?" -m MODEL --tp 2
    """
    if tp is not None and not _leads():
        heatmap, layers = None, None
    if not prompt.strip():
        raise CliError("the prompt is empty: say what to answer with -p", 2)
    if rounds is not None and not compare:
        raise CliError("--rounds is for --compare, which times both answers: give it as well", 2)
    if heatmap is not None:
        _check_writable(heatmap)
    elif layers is not None:
        raise CliError("--layers chooses what --heatmap draws: give --heatmap FILE.png as well", 2)
    wanted = None if layers is None else _layer_list(layers)
    if save is not None and save.exists() and not save.is_dir():
        raise CliError(f"--save {save}: that is a file, name a folder", 2)

    console = stderr()
    with console.status("importing torch and transformers"):
        from st3.models.places import check_placed
        from st3.tools.cli import _loading, _seeing
    chosen = read_policy(policy, budget)
    policy = shown(policy, chosen)
    pictures = _loading.load_images(images)
    with console.status(f"loading {model or 'the bundled model'}"):
        loaded = _loading.load(
            model, device, dtype.value, trust_remote_code, device_map, tp, attention, threads,
            revision,
        )  # fmt: skip
    if len(pictures) > 1 and not as_json:
        console.print(
            f"{len(pictures)} images in one prompt; `st3 batch` answers each by itself",
            style="dim", soft_wrap=True,
        )  # fmt: skip
    result: dict[str, Any] = {
        "model": loaded.name,
        "policy": policy,
        "images": images,
        "prompt": prompt,
        **({} if system is None else {"system": system}),
        "conditions": loaded.conditions(),
    }
    with _failures_in_one_line():
        if heatmap is not None:
            check_placed(loaded.model)
        trimmer = _trimmer(loaded.model, chosen, policy)
        if wanted is not None:
            _check_layers(wanted, trimmer.schedule.num_layers)
        if save is not None:
            _check_saved(save, trimmer, policy)
        inputs = _loading.prepare(loaded, pictures, prompt, system)
    if compare:
        result |= _compared(loaded, inputs, trimmer, max_new_tokens, rounds or 3, policy, as_json)
    else:
        result |= _answered(loaded, inputs, trimmer, max_new_tokens, as_json)
    result["report"] = trimmer.report.to_dict()
    if heatmap is not None:
        with _failures_in_one_line():
            places = _seeing.places(loaded, inputs, pictures, prompt, system)
        _draw(heatmap, places, pictures, trimmer.report, wanted, policy)
        result["heatmap"] = str(heatmap)
        if not as_json:
            console.print(f"kept patches drawn in {printable(heatmap)}", soft_wrap=True)
    if save is not None:
        with _failures_in_one_line(), console.status("recording the run"):
            _seeing.save_run(save, loaded, trimmer, inputs, pictures, max_new_tokens, result)
        result["run"] = str(save)
        if not as_json:
            where = printable(save)
            console.print(f"run recorded in {where}: st3 report {where}", soft_wrap=True)
    if as_json:
        print_json(result)


def _leads() -> bool:
    """Whether this is the one of torchrun's processes that prints; the others are silenced."""
    if os.environ.get("RANK", "0") == "0":
        return True
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return False


def _answered(
    loaded: Loaded, inputs: Any, trimmer: Any, max_new_tokens: int, as_json: bool
) -> dict[str, Any]:
    """One streamed answer, with a summary on stderr."""
    from st3.tools.cli import _measure, _show

    with _failures_in_one_line():
        answer = _measure.answer(
            loaded, inputs, max_new_tokens, trimmer, None if as_json else _write
        )
    if not as_json:
        _write("\n")
        stderr().print(_show.summary(answer, trimmer.report), style="dim", soft_wrap=True)
    return answer.to_dict()


def _compared(
    loaded: Loaded,
    inputs: Any,
    trimmer: Any,
    max_new_tokens: int,
    runs: int,
    policy: str,
    as_json: bool,
) -> dict[str, Any]:
    """Both answers and their times, as a table on stdout."""
    from rich.progress import Progress

    from st3.tools.cli import _measure, _show

    with _failures_in_one_line(), Progress(console=stderr(), transient=True) as progress:
        task = progress.add_task("untrimmed and trimmed in turn", total=2 * runs + 2)
        untrimmed, trimmed = _measure.compare(
            loaded, inputs, max_new_tokens, trimmer, runs, lambda: progress.advance(task)
        )
    if not as_json:
        out = stdout()
        out.print(_show.comparison(untrimmed, trimmed, trimmer.report, policy))
        out.print(_show.conditions(runs, loaded.conditions()), style="dim")
        weights = sum(p.numel() * p.element_size() for p in trimmer.parts.text.parameters())
        if hint := _show.why_no_faster(untrimmed, trimmed, trimmer.report, weights):
            out.print(hint)
    return {**trimmed.to_dict(), "untrimmed": untrimmed.to_dict(), "runs": runs}


@contextlib.contextmanager
def _failures_in_one_line() -> Iterator[None]:
    """What transformers, torch and st3 raise when a model, prompt or policy cannot be run."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CliError(first_line(error)) from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _check_writable(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise CliError(f"--heatmap {path}: the name must end in one of {', '.join(PICTURES)}", 2)
    if not path.parent.is_dir():
        raise CliError(f"--heatmap {path}: there is no folder {str(path.parent)!r}", 2)
    if not os.access(path.parent, os.W_OK):
        raise CliError(f"--heatmap {path}: the folder cannot be written", 2)


def _layer_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise CliError(f"--layers {text}: give numbers with commas, such as 3,7,11", 2) from error


def _trimmer(model: Any, chosen: Any, policy: str) -> Any:
    """The trimmer of a policy. Raises CliError for one that does not fit the model's layers."""
    import st3

    try:
        return st3.trim(model, chosen)
    except st3.UnsupportedModelError:
        raise
    except ValueError as error:
        raise CliError(f"--policy {policy}: {first_line(error)}", 2) from error


def _check_layers(wanted: list[int], count: int) -> None:
    """Before anything is answered, which may take minutes."""
    if bad := [layer for layer in wanted if not 0 <= layer < count]:
        raise CliError(f"--layers: there is no layer {bad[0]}, the model has 0 to {count - 1}", 2)


def _check_saved(folder: Path, trimmer: Any, policy: str) -> None:
    """Before anything is answered: whether the run can be recorded, and written. Makes the
    folder."""
    if trimmer.policy.rerank:
        raise CliError(
            f"--save: a run of {policy} cannot be recorded, since it ranks tokens anew while it "
            "decodes: leave out rerank_every, recall_every or dycoke",
            2,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--save {folder}: {first_line(error)}", 2) from error


def _draw(
    path: Path,
    places: list[Place],
    pictures: list[Image],
    report: Any,
    wanted: list[int] | None,
    policy: str,
) -> None:
    from st3.tools.see import heatmap

    kept = report.kept[0]
    layers = heatmap.choose_layers(kept, whole=report.n_visual[0]) if wanted is None else wanted
    try:
        picture = heatmap.draw(
            pictures,
            places,
            {layer: report.kept_positions(layer).tolist() for layer in layers},
            title=f"{policy}: patches kept at prefill; {len(kept)} layers, counted from 0",
        )
    except ValueError as error:
        raise CliError(first_line(error)) from error
    try:
        picture.save(path)
    except OSError as error:
        raise CliError(f"--heatmap {path}: {first_line(error)}") from error
