"""Pages in one HTML file: style, script, data and pictures inlined, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

_HERE = Path(__file__).parent


def render(page: str, title: str, data: Any) -> str:
    """The page ``page`` (``analysis``, ``report`` or ``tune``) with its data.

    Args:
        data: plain values, read by the page's script.
    """
    shell = (_HERE / "shell.html").read_text(encoding="utf-8")
    # Inside a <script> nothing but "</" ends it; JSON may write any "<" as an escape.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": (_HERE / "style.css").read_text(encoding="utf-8"),
        "BODY": (_HERE / f"{page}.html").read_text(encoding="utf-8"),
        "SCRIPT": "".join(
            (_HERE / name).read_text(encoding="utf-8") for name in ("common.js", f"{page}.js")
        ),
        "DATA": text,
    }
    for name, part in parts.items():
        shell = shell.replace(f"@@{name}@@", part, 1)
    return shell


def data_url(picture: Image.Image, longest: int) -> str:
    """A picture as a ``data:`` address, shrunk to at most ``longest`` pixels a side; as JPEG where
    that is smaller."""
    scale = min(1.0, longest / max(picture.size))
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    written = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, kind, **options)
        written[kind] = buffer.getvalue()
    kind = min(written, key=lambda k: len(written[k]))
    return f"data:image/{kind};base64,{base64.b64encode(written[kind]).decode()}"
