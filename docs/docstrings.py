"""Docstrings for the API reference: what Markdown would read otherwise is rewritten."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`(~?)([^`]+)`")
TOGETHER = re.compile(r"^(?P<i> *)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=i) +\S.*)*)", re.M)
BRACKETS = re.compile(r"\](\s?)\[")


def plain(text: str) -> str:
    """Sphinx roles become code, with the last part alone after a ``~``; names that share a line,
    "n_text, n_visual: tokens", get one each; a shape behind another is no link."""
    text = ROLE.sub(lambda role: f"`{role[2].split('.')[-1] if role[1] else role[2]}`", text)
    text = TOGETHER.sub(
        lambda found: "\n".join(
            f"{found['i']}{name}: {found['text']}" for name in found["names"].split(", ")
        ),
        text,
    )
    return BRACKETS.sub(r"]\1\\[", text)


class Plain(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
