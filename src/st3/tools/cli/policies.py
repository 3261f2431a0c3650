"""`st3 policies`: the trimming policies, with their arguments, defaults and papers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding

from st3.tools.cli._common import stdout

if TYPE_CHECKING:
    from st3.methods.policies import Policy


def policies() -> None:
    """List the policies with their arguments, defaults and papers.

    [bold]Example[/bold]: st3 policies
    """
    import st3

    console = stdout()
    for name, policy in st3.available().items():
        console.print(f"[bold]{name}[/bold]: {escape(policy.paper or 'no paper')}")
        summary = inspect.getdoc(policy) or ""
        body = [escape(summary.partition("\n")[0])]
        body += [f"[cyan]{key}[/cyan]={escape(default)}" for key, default in arguments(policy)]
        console.print(Padding("\n".join(body), (0, 0, 0, 4), expand=False))
        console.print()
    presets = st3.presets()
    if presets:
        console.print("[bold]Presets[/bold]")
        for name, preset in presets.items():
            console.print(f"    {name}  is  {escape(str(preset))}")
        console.print()
    console.print("Give one with --policy, for example --policy fastv:layer=2,drop=0.75")


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
