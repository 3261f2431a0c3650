"""`st3 policies`: the trimming policies, with their arguments, defaults and papers."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from rich.markup import escape

from st3.cli._common import stdout


def policies() -> None:
    """List the policies with their arguments, defaults and papers."""
    import st3

    console = stdout()
    for name, policy in st3.policies.available().items():
        paper = getattr(policy, "paper", "")
        console.print(f"[bold]{name}[/bold]" + (f"  ({escape(paper)})" if paper else ""))
        summary = (inspect.getdoc(policy) or "").strip().splitlines()
        if summary:
            console.print(f"    {escape(summary[0])}")
        for field in dataclasses.fields(policy):
            if field.init:
                console.print(f"    [cyan]{field.name}[/cyan] = {escape(_default(field))}")
        console.print()
    console.print("Give one with --policy, for example --policy fastv:layer=2,drop=0.5")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(required)"
