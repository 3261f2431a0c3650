"""The README as a package index shows it: there, links into the repository lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)
PICTURE = re.compile(
    r"^(?:!\[[^\]]*\]\((?!https?:)[^)]*\)|<picture>\n(?:(?!https?:).)*?</picture>)\n+", re.M | re.S
)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)[^)\s]+\)")


def for_index(text: str) -> str:
    """``text`` with relative links as plain words and without pictures of the repository; code
    blocks stay as they are."""
    parts = FENCE.split(text)
    return "".join(
        part if part.startswith("```") else LINK.sub(r"\1", PICTURE.sub("", part)) for part in parts
    )


class Readme(MetadataHookInterface):
    """Fills in ``readme``."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_index(text)}
