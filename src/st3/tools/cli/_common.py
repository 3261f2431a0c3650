"""What the commands share: their error, their consoles, the bundled files."""

from __future__ import annotations

import re

from rich.console import Console

from st3.tools.common.bundled import BUNDLED_MODEL as BUNDLED_MODEL


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


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


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
