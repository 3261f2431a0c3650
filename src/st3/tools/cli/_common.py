"""What the commands share: their error, their consoles, the bundled files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from st3.tools.common.bundled import BUNDLED_MODEL as BUNDLED_MODEL
from st3.tools.common.errors import first_line

if TYPE_CHECKING:
    from st3.methods.policies import Policy


class CliError(Exception):
    """A foreseen failure, shown as one line. exit_code: 1 it failed, 2 it was asked for wrongly."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def format_message(self) -> str:
        return str(self)


def stdout() -> Console:
    """Made at each call, because tests and pipes exchange sys.stdout."""
    return Console(highlight=False)


_quiet = False


def be_quiet(quiet: bool) -> None:
    """Whether :func:`stderr` is silent from now on."""
    global _quiet
    _quiet = quiet


def stderr() -> Console:
    """For progress and notes; silent with --quiet. What has to be seen is printed to sys.stderr."""
    return Console(stderr=True, highlight=False, quiet=_quiet)


def warn(text: str) -> None:
    """A line that --quiet does not hold back."""
    print(f"warning: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    """One JSON object on stdout: as UTF-8, except where a name that is not UTF-8 is in it."""
    text = json.dumps(value, ensure_ascii=False)
    if printable(text) != text:
        text = json.dumps(value)
    print(text)


def printable(text: object) -> str:
    """A text that can be written anywhere: file names that are not UTF-8 get escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def split_policies(text: str) -> list[str]:
    """``"st3,fastv:layer=2,drop=0.5,vtw"`` -> three policies: a part that begins with ``name=``
    belongs to the policy before it, and commas in parentheses split nothing."""
    parts: list[str] = []
    for part in re.split(r",(?![^()]*\))", text):
        if parts and re.match(r"\s*\w+=", part):
            parts[-1] += "," + part
        elif part.strip():
            parts.append(part.strip())
    return parts


def listed(given: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    """The policies that --policies names, which may be repeated; ``default`` where it is not
    given. Raises CliError where it names none."""
    found = [name for text in given or default for name in split_policies(text)]
    if not found:
        raise CliError("--policies names no policy: see `st3 policies`", 2)
    return found


def shown(text: str, policy: Policy) -> str:
    """What to call a policy: as it was given, except where a budget or a file says more."""
    from st3.methods.policies import parse_text

    try:
        same = parse_text(text)
    except ValueError:  # a file
        return str(policy)
    return text if policy == same else str(policy)


def read_policy(text: str, budget: str | None = None, option: str = "--policy") -> Policy:
    """What --policy and --budget say. Raises CliError that names the one that is wrong."""
    from st3.methods.policies import parse, read_budget

    try:
        share = {} if budget is None else {"budget": read_budget(budget)}
    except ValueError as error:
        raise CliError(f"--{first_line(error)}", 2) from error
    try:
        return parse(text, **share)
    except (TypeError, ValueError) as error:
        raise CliError(f"{option} {text}: {first_line(error)}", 2) from error
