"""Docstrings for the API reference: what Markdown would read otherwise is written for it."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`(~?)([^`]+)`")


def plain(text: str) -> str:
    """Sphinx roles become code, with the last part alone after a ``~``; ``][`` links nothing."""
    named = ROLE.sub(lambda role: f"`{role[2].split('.')[-1] if role[1] else role[2]}`", text)
    return named.replace("][", "] [")


class Plain(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
