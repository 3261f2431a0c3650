"""`st3 analyze`: what a model looks at, as figures and one page."""

from __future__ import annotations

import contextlib
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.tools.cli._common import CliError, print_json, printable, stderr, stdout
from st3.tools.cli._options import (
    AsJson,
    Attention,
    Device,
    DType,
    MaxNewTokens,
    Model,
    Precision,
    Revision,
    System,
    Threads,
    TrustRemoteCode,
)
from st3.tools.common.errors import first_line

if TYPE_CHECKING:
    from st3.tools.cli._loading import Loaded
    from st3.tools.see import Analysis

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def analyze(
    images: Annotated[
        list[Path],
        typer.Option(
            "--image", "-i", metavar="FILE_OR_FOLDER",
            help="An image or a folder of images; may be repeated.",
        ),
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompt", "-p", metavar="TEXT_OR_FILE",
            help="A prompt, or a text file with one a line; may be repeated. Images take turns.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for page, figures and data."),
    ],
    system: System = None,
    model: Model = None,
    revision: Revision = None,
    max_new_tokens: MaxNewTokens = 64,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N images.")
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="SHARE", help="Of the visual tokens in a kept set, for the overlaps."
        ),
    ] = "25%",
    as_json: AsJson = False,
    attention: Attention = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Watch an untrimmed model's attention over a set of images.

    The paper's analyses: where attention goes by layer and by length, how alike layers are, how
    many visual tokens matter, whether kept sets hold over layers and steps, and where in the image
    attention lies. The measures are summed up while the model runs, in memory that does not grow
    with the answer. Which policy to use they do not say: that is what `st3 tune` is for.

    [bold]Examples[/bold]

    st3 analyze -i photos/ -p "describe the image in detail." -o seen

    st3 analyze -i photos/ -p questions.txt -o seen -m ./llava-1.5-7b-hf --dtype float16
    """
    share = _share(keep)
    paths = image_files(images)[:limit]
    texts = prompt_texts(prompts)
    _check_folder(out)
    console = stderr()
    with console.status("importing torch and transformers"):
        from st3.tools.cli import _loading
    with console.status(f"loading {model or 'the bundled model'}"):
        loaded = _loading.load(
            model, device, dtype.value, trust_remote_code,
            attention=attention, threads=threads, revision=revision,
        )  # fmt: skip
    start = time.perf_counter()
    analysis, unplaced = _analysed(loaded, paths, texts, system, max_new_tokens, share)
    about = {
        "model": loaded.name,
        "prompts": f"{_number(len(paths), 'image')}, {_number(len(texts), 'prompt')}, "
        f"{analysis.decode_steps} decode steps (at most {max_new_tokens} new tokens each)",
        "visual": f"{analysis.visual_tokens:.0f} in a prompt; {unplaced}".removesuffix("; "),
        "conditions": f"{loaded.conditions()}, greedy, untrimmed",
        "command": _command(model, images, prompts, system, max_new_tokens, limit),
    }  # fmt: skip
    files = _written(out, analysis, about)
    if as_json:
        seconds = round(time.perf_counter() - start, 1)
        result = {"page": str(files[0]), "data": str(files[1]), "seconds": seconds}
        print_json(result)
        return
    terminal = stdout()
    terminal.print(
        f"{printable(files[0])}: the page; beside it {len(files) - 1} files", soft_wrap=True
    )
    terminal.print("To find a policy for this model, on your own images: st3 tune", soft_wrap=True)


def image_files(given: list[Path]) -> list[Path]:
    """The images named, and those in the folders named, in order. Raises CliError for none."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
            if not inside:
                raise CliError(f"--image {path}: there are no images in this folder", 2)
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise CliError(f"--image {path}: no such file or folder", 2)
    return found


def prompt_texts(given: list[str]) -> list[str]:
    """The prompts named, and the lines of the files named. Raises CliError for empty ones."""
    found: list[str] = []
    for text in given:
        path = Path(text)
        if len(text) < 256 and path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise CliError(f"--prompt {text}: {first_line(error)}", 2) from error
            found += [line.strip() for line in lines if line.strip()]
        elif re.fullmatch(r"\S+\.(txt|csv|md|jsonl?)", text):
            raise CliError(f"--prompt {text}: no such file", 2)
        elif text.strip():
            found.append(text)
    if not found:
        raise CliError("--prompt: there is no prompt in what was given", 2)
    return found


def _share(text: str) -> float:
    from st3.methods.policies import read_budget

    with contextlib.suppress(ValueError):
        if 0 < (share := read_budget(text)) < 1:
            return share
    raise CliError(f"--keep {text}: give a share between 0 and 1, such as 25%", 2)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CliError(f"--out {printable(out)}: that is a file, name a folder", 2)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--out {out}: {first_line(error)}", 2) from error


def _number(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _command(
    model: str | None,
    images: list[Path],
    prompts: list[str],
    system: str | None,
    max_new_tokens: int,
    limit: int | None,
) -> str:
    words = ["st3", "analyze"]
    for path in images:
        words += ["-i", str(path)]
    for text in prompts:
        words += ["-p", text]
    words += ["--system", system] if system else []
    words += ["-m", model] if model else []
    words += ["--max-new-tokens", str(max_new_tokens)]
    words += ["--limit", str(limit)] if limit else []
    return printable(shlex.join(words))


def _analysed(
    loaded: Loaded,
    paths: list[Path],
    texts: list[str],
    system: str | None,
    max_new_tokens: int,
    keep: float,
) -> tuple[Analysis, str]:
    from rich.progress import Progress

    from st3.models.places import Place
    from st3.tools.cli import _loading, _seeing
    from st3.tools.see import analyse

    known: dict[Any, list[Place] | None] = {}
    why_not = ""

    def samples() -> Iterator[tuple[Any, list[Place] | None]]:
        nonlocal why_not
        for number, path in enumerate(paths):
            (picture,) = _loading.load_images([str(path)])
            prompt = texts[number % len(texts)]
            inputs = _loading.prepare(loaded, [picture], prompt, system)
            key = (picture.size, prompt)
            if key not in known and not why_not:
                known[key], why_not = _seeing.places_or_why(
                    loaded, inputs, [picture], prompt, system
                )
            yield inputs, known.get(key)

    with Progress(console=stderr(), transient=True) as progress:
        task = progress.add_task("watching", total=len(paths))
        try:
            with _loading.quiet():
                analysis = analyse(
                    loaded.model, samples(), max_new_tokens, keep, lambda: progress.advance(task)
                )
                return analysis, why_not
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise CliError(first_line(error)) from error


def _written(out: Path, analysis: Analysis, about: dict[str, str]) -> list[Path]:
    from st3.tools.see.figures import figures
    from st3.tools.see.page import write

    try:
        with stderr().status("drawing"):
            return write(out, analysis, list(figures(analysis)), about)
    except (ValueError, OSError) as error:
        raise CliError(first_line(error)) from error
