"""What every command has: --version, --quiet, old names of options, flags without a value."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from st3.tools.cli import _common
from st3.tools.cli._options import OLD_NAMES


def print_version(value: bool) -> None:
    """The callback of --version."""
    if value:
        print(f"st3 {installed()}")
        raise typer.Exit()


def installed() -> str:
    """The version of st3, also where it was not installed but put on the path."""
    try:
        return version("st3")
    except PackageNotFoundError:
        import st3

        return st3.__version__


Version = Annotated[
    bool,
    typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr; errors only.")
]


class Plain:
    """A command or group whose help shows flags without a value, as they are given."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""  # newer typers write <bool> there
        return params


class Command(Plain, TyperCommand):
    """A command of st3, which takes its options' old names, too."""

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)
        params = {name: param for param in self.get_params(ctx) for name in param.opts}
        for old, name in OLD_NAMES.get(self.name or "", {}).items():
            twin = copy.copy(params[name])
            twin.opts, twin.secondary_opts = [old], []
            twin.add_to_parser(parser, ctx)
        return parser


class Group(Plain, TyperGroup):
    """A command that has commands."""


def common(function: Callable[..., None]) -> Callable[..., None]:
    """A command's function with the options of all commands behind its own."""

    @functools.wraps(function)
    def run(**given: Any) -> None:
        given.pop("show_version")
        _common.be_quiet(given.pop("quiet"))
        function(**given)

    signature = inspect.signature(function, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter("quiet", kind, default=False, annotation=Quiet),
        inspect.Parameter("show_version", kind, default=False, annotation=Version),
    ]
    parameters = [*signature.parameters.values(), *more]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    del run.__wrapped__  # typer would ask it for its hints
    return run
