"""`st3 policies`: the trimming policies; or one of them, with its arguments and defaults."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import CliError, print_json, stdout
from st3.tools.cli._options import AsJson

if TYPE_CHECKING:
    from st3.methods.policies import Policy

FIRST, LAST = (DEFAULT_POLICY, "st3"), ("random", "uniform", "none")


def policies(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Tell all about this one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the policies; of one that is named its arguments, defaults and paper.

    [bold]Examples[/bold]

    st3 policies

    st3 policies fastv
    """
    import st3

    known, presets = st3.available(), st3.presets()
    if name is not None and name not in known:
        if name in presets:
            stdout().print(f"{name}  is  {escape(str(presets[name]))}", soft_wrap=True)
            return
        near = difflib.get_close_matches(name.lower(), [*known, *presets], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise CliError(f"no policy {name!r}: {hint}", 2)
    if as_json:
        chosen = known if name is None else {name: known[name]}
        found: dict[str, Any] = {"policies": [_plain(each) for each in chosen.values()]}
        print_json(found | {"presets": {key: str(value) for key, value in presets.items()}})
    elif name is None:
        _list(known, presets)
    else:
        _tell(known[name])


def _list(known: dict[str, type[Policy]], presets: dict[str, Policy]) -> None:
    from st3.tools.common import tables

    middle = sorted(set(known) - {*FIRST, *LAST})
    names = [name for name in (*FIRST, *middle, *LAST) if name in known]
    rows = [(name, _summary(known[name]), known[name].paper or "") for name in names]
    console = stdout()
    head = ("policy", "what it drops", "paper")
    console.print(tables.console(head, rows, left=(0, 1, 2), fold=(1, 2)))
    if presets:
        given = [(name, str(preset)) for name, preset in presets.items()]
        console.print("")
        console.print(tables.console(("preset", "is"), given, left=(0, 1), fold=(1,)))
    console.print(
        "\nGive one with --policy, for example --policy fastv:layer=2,drop=0.75; every policy also "
        "takes budget=0.35, the mean share of the visual tokens over the layers. `st3 policies "
        "NAME` tells a policy's arguments and defaults."
    )


def _tell(policy: type[Policy]) -> None:
    console = stdout()
    console.print(f"[bold]{policy.name}[/bold]: {escape(policy.paper or 'no paper')}\n")
    # (a name alone of what is a link in the reference)
    told = re.sub(r":\w+:`~?([^`]*)`", r"\1", inspect.getdoc(policy) or "")
    console.print(escape(told), soft_wrap=True)
    console.print("\n[bold]Arguments and defaults[/bold]")
    for key, default in arguments(policy):
        console.print(f"    [cyan]{key}[/cyan]={escape(default)}", soft_wrap=True)


def _plain(policy: type[Policy]) -> dict[str, Any]:
    return {
        "name": policy.name,
        "paper": policy.paper,
        "summary": _summary(policy),
        "arguments": dict(arguments(policy)),
    }


def _summary(policy: type[Policy]) -> str:
    """The first sentence of what is written about it."""
    paragraph = " ".join((inspect.getdoc(policy) or "").split("\n\n")[0].split())
    sentence, dot, _ = paragraph.partition(". ")
    return sentence + dot.strip()


def arguments(policy: type[Policy]) -> Iterator[tuple[str, str]]:
    """Names and defaults of a policy's arguments, as they are written in --policy."""
    from st3.methods.policies import Policy

    for field in dataclasses.fields(policy):
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if isinstance(default, Policy):
            yield field.name, f"({default})"
        elif dataclasses.is_dataclass(
            default
        ):  # an annealing rule, whose parts are given one by one
            for part in dataclasses.fields(default):
                yield part.name, str(getattr(default, part.name))
        elif default is dataclasses.MISSING:
            yield field.name, "(required)"
        elif isinstance(default, tuple):
            yield field.name, "/".join(map(str, default))
        else:
            yield field.name, "none" if default is None else str(default)
