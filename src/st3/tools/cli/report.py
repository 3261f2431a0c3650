"""`st3 report`: one page about a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from st3.tools.cli._common import CliError, print_json, printable, stderr, stdout
from st3.tools.cli._options import AsJson
from st3.tools.common.errors import first_line

if TYPE_CHECKING:
    from st3.tools.see.record import Run


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that `st3 generate --save RUN` wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.html", help="Default: RUN/report.html."),
    ] = None,
    gif: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.gif", help="Animation of annealing. Default: RUN/annealing.gif."
        ),
    ] = None,
    no_gif: Annotated[bool, typer.Option("--no-gif", help="Leave the animation out.")] = False,
    picture: Annotated[
        int, typer.Option(min=1, help="Which image of the prompt the animation shows.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Show a recorded run as one HTML page that opens from disk, and as an animation.

    The page has the image with what each layer kept (a slider), the answer word by word with what
    was visible and looked at, the KV cache over the steps, and a table of costs.

    [bold]Example[/bold]

    st3 generate photo.png -p "describe the image in detail." --save run

    st3 report run
    """
    page = out or run / "report.html"
    film = gif or run / "annealing.gif"
    for option, path, ends in (("--out", page, ".html"), ("--gif", film, ".gif")):
        if path.suffix.lower() != ends:
            raise CliError(f"{option} {printable(path)}: the name must end in {ends}", 2)
    with stderr().status("reading the run"):
        from st3.tools.see.record import Run

        try:
            recorded = Run.load(run)
        except ValueError as error:
            raise CliError(first_line(error), 2) from error
    drawn = not no_gif and recorded.places is not None
    if drawn and picture > len(recorded.pictures):
        count = len(recorded.pictures)
        raise CliError(f"--picture {picture}: the prompt had {count} image(s), from 1 on", 2)
    _write_page(page, recorded)
    if drawn:
        _write_film(film, recorded, picture - 1)
    elif not no_gif:
        stderr().print(f"no animation: {recorded.unplaced}", soft_wrap=True, markup=False)
    written = {"page": str(page), "animation": str(film) if drawn else None}
    if as_json:
        print_json(written)
        return
    for name in filter(None, written.values()):
        stdout().print(printable(name), soft_wrap=True, markup=False)


def _write_page(path: Path, run: Run) -> None:
    from st3.tools.common.palette import color
    from st3.tools.see.pages import data_url, render

    longest = 900 if len(run.pictures) <= 2 else 480
    data = {
        **run.to_dict(),
        "pictures": [data_url(picture, longest) for picture in run.pictures],
        "color": color(run.about.get("policy", "")),
    }
    title = f"st3 report: {run.about.get('prompt', 'a run')}"
    try:
        path.write_text(render("report", title, data), encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {str(path)!r}: {first_line(error)}") from error


def _write_film(path: Path, run: Run, picture: int) -> None:
    from st3.tools.see.heatmap import animate, save_gif

    try:
        with stderr().status("drawing the animation"):
            save_gif(path, animate(run, picture=picture))
    except (ValueError, OSError) as error:
        raise CliError(f"{str(path)!r}: {first_line(error)}") from error
