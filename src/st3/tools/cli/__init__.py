"""The command line: `st3 bench`, `st3 cost`, `st3 generate` ...; one file for each command.

Nothing heavy is imported before a command needs it, so that `--help` and wrong usage answer at
once.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from st3.tools.cli._command import Command, Group, Version, common
from st3.tools.cli.analyze import analyze
from st3.tools.cli.batch import batch
from st3.tools.cli.bench import bench
from st3.tools.cli.cost import cost
from st3.tools.cli.demo import demo
from st3.tools.cli.eval import evaluate
from st3.tools.cli.generate import generate
from st3.tools.cli.models import models
from st3.tools.cli.policies import policies
from st3.tools.cli.report import report
from st3.tools.cli.serve import serve
from st3.tools.cli.tune import tune
from st3.tools.cli.vllm import app as vllm


class OneLineErrors(Group):
    """Prints every foreseen error as one `error:` line on stderr; exit code 2 means wrong usage."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        standalone_mode = extra.get("standalone_mode", True)
        extra["standalone_mode"] = False
        try:
            with warnings.catch_warnings():
                show = warnings.showwarning
                warnings.showwarning = functools.partial(_in_one_line, show)
                code = super().main(args, *rest, **extra)
        except typer.Abort:
            code = 130
        except Exception as error:
            # typer's and click's own exceptions, whichever of the two the installed typer uses,
            # and CliError have these two; anything else is a bug and keeps its traceback.
            if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
                raise
            print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
            code = error.exit_code
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _in_one_line(show: Any, message: Any, category: type[Warning], *where: Any) -> None:
    """A policy's file that may be of another model is for users to know of; where in the code it
    was noticed is not."""
    if category.__name__ == "OtherModelWarning":
        print(f"warning: {message}", file=sys.stderr)
    else:
        show(message, category, *where)


app = typer.Typer(
    name="st3",
    cls=OneLineErrors,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    show_version: Version = False,
) -> None:
    """Trim the visual tokens of vision-language models, spatially and over time (ST3).

    [bold]Example[/bold]: st3 generate photo.png -p "describe the image in detail." --compare
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


for function in (
    analyze, batch, bench, cost, demo, evaluate, generate, models, policies, report, serve, tune,
):  # fmt: skip
    name = {"evaluate": "eval"}.get(function.__name__, function.__name__)
    app.command(name, cls=Command)(common(function))
app.add_typer(vllm, name="vllm", cls=Group)

__all__ = ["app"]
