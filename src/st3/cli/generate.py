"""`st3 generate`: answer a prompt about images, trimmed, and on request compared and drawn."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.cli._common import CliError, first_line, stderr, stdout

if TYPE_CHECKING:
    from PIL.Image import Image

    from st3.cli._loading import Loaded

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class DType(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def generate(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Image files, all shown in one prompt.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question or instruction.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="PATH_OR_ID", help="Default: the bundled st3-tiny."),
    ] = None,
    policy: Annotated[
        str, typer.Option(metavar="NAME[:KEY=VALUE,...]", help="How to trim; see `st3 policies`.")
    ] = "st3",
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer untrimmed as well, and time both.")
    ] = False,
    runs: Annotated[
        int, typer.Option(min=1, help="Timed runs of each with --compare; medians are shown.")
    ] = 3,
    heatmap: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw which patches some layers kept."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="I,J,...", help="Layers to draw, from 0. Default: four that differ."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 200,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[DType, typer.Option(help="auto: as the model was saved.")] = DType.auto,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's folder run its own code.")
    ] = False,
) -> None:
    """Answer a prompt about one or more images, with visual tokens trimmed.

    [bold]Examples[/bold]

    st3 generate photo.png -p "describe the image in detail."

    st3 generate photo.png -p "what is at the top left?" --compare --heatmap kept.png

    st3 generate a.jpg b.jpg -p "compare the two." --model ./llava-1.5-7b-hf --policy fastv:layer=2,drop=0.5

    st3 generate photo.png -p "describe the image." --json --compare | jq .report.mean_share
    """
    if not prompt.strip():
        raise CliError("the prompt is empty: say what to answer with -p", 2)
    if heatmap is not None:
        _check_writable(heatmap)
    elif layers is not None:
        raise CliError("--layers chooses what --heatmap draws: give --heatmap FILE.png as well", 2)
    wanted = None if layers is None else _layer_list(layers)

    console = stderr()
    with console.status("importing torch and transformers"):
        import st3
        from st3.cli import _loading, _measure, _show
        from st3.heatmap import check_supported
    try:
        chosen = st3.policies.parse(policy)
    except (TypeError, ValueError) as error:
        raise CliError(f"--policy {policy}: {first_line(error)}", 2) from error
    pictures = _loading.load_images(images)
    with console.status(f"loading {model or 'the bundled model'}"):
        loaded = _loading.load(model, device, dtype.value, trust_remote_code)
    try:
        if heatmap is not None:
            check_supported(loaded.model.config.model_type)
        trimmer = st3.trim(loaded.model, chosen)
        inputs = _loading.prepare(loaded, pictures, prompt)
        result: dict[str, Any] = {
            "model": loaded.name,
            "policy": policy,
            "images": images,
            "prompt": prompt,
            "conditions": loaded.conditions(),
        }
        if compare:
            from rich.progress import Progress

            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("untrimmed and trimmed in turn", total=2 * runs + 2)
                untrimmed, trimmed = _measure.compare(
                    loaded, inputs, max_new_tokens, trimmer, runs, lambda: progress.advance(task)
                )
            report = trimmer.report
            result |= {"runs": runs, "untrimmed": untrimmed.to_dict()}
            if not as_json:
                out = stdout()
                out.print(_show.comparison(untrimmed, trimmed, report, policy))
                out.print(_show.conditions(runs, loaded.conditions()), style="dim")
        else:
            write = None if as_json else _write
            trimmed = _measure.answer(loaded, inputs, max_new_tokens, trimmer, write)
            report = trimmer.report
            if not as_json:
                _write("\n")
                console.print(_show.summary(trimmed, report), style="dim")
        result |= {**trimmed.to_dict(), "report": report.to_dict()}
        if heatmap is not None:
            _draw(heatmap, loaded, pictures, report, wanted, policy)
            result["heatmap"] = str(heatmap)
            if not as_json:
                console.print(f"kept patches drawn in {heatmap}", soft_wrap=True)
    except (TypeError, ValueError, NotImplementedError, MemoryError, RuntimeError) as error:
        # What transformers, torch and st3 raise for a model, prompt or policy that cannot be run.
        raise CliError(f"{type(error).__name__}: {first_line(error)}") from error
    if as_json:
        print(json.dumps(result, ensure_ascii=False))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _check_writable(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise CliError(f"--heatmap {path}: the name must end in one of {', '.join(PICTURES)}", 2)
    if not path.parent.is_dir():
        raise CliError(f"--heatmap {path}: there is no folder {str(path.parent)!r}", 2)


def _layer_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise CliError(f"--layers {text}: give numbers with commas, such as 3,7,11", 2) from error


def _draw(
    path: Path,
    loaded: Loaded,
    pictures: list[Image],
    report: Any,
    wanted: list[int] | None,
    policy: str,
) -> None:
    from st3 import heatmap

    kept = [len(report.kept_positions(layer)) for layer in range(len(report.kept))]
    layers = heatmap.choose_layers(kept) if wanted is None else wanted
    if bad := [layer for layer in layers if not 0 <= layer < len(kept)]:
        raise ValueError(f"--layers {bad[0]}: the model has layers 0 to {len(kept) - 1}")
    picture = heatmap.draw(
        pictures,
        [heatmap.seen_box(p.size, loaded.processor.image_processor) for p in pictures],
        report.visual_per_image[0],
        {layer: report.kept_positions(layer).tolist() for layer in layers},
        title=f"{policy}: kept at prefill (bright, outlined); layers count from 0 to {len(kept) - 1}",
    )
    try:
        picture.save(path)
    except OSError as error:
        raise CliError(f"--heatmap {path}: {first_line(error)}") from error
