"""The analysis as one page, and as files."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st3.tools.see.figures import Figure
from st3.tools.see.pages import render
from st3.tools.see.result import Analysis

PAGE, DATA = "analysis.html", "analysis.json"


def write(
    folder: Path,
    analysis: Analysis,
    figures: Sequence[Figure],
    about: dict[str, str],
) -> list[Path]:
    """Write the page, the data and each figure, light and dark, into a folder that exists.

    Args:
        about: model, prompts, conditions ...: the head of the page.

    Returns:
        the files, the page first.
    """
    page = folder / PAGE
    page.write_text(html(figures, about), encoding="utf-8")
    data = folder / DATA
    whole = {"about": about, **analysis.to_dict()}
    data.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    files = [page, data]
    for figure in figures:
        for theme, png in figure.png.items():
            name = f"{figure.name}.png" if theme == "light" else f"{figure.name}-{theme}.png"
            path = folder / name
            path.write_bytes(png)
            files.append(path)
    return files


def html(figures: Sequence[Figure], about: dict[str, str]) -> str:
    """The page as text: nothing in it is fetched from elsewhere.

    Args:
        figures: in the order of the page.
        about: model, prompts, conditions ...: the head of the page.
    """
    data: dict[str, Any] = {
        "about": about,
        "figures": [
            {
                "title": figure.title,
                "text": figure.text,
                "head": figure.head,
                "rows": figure.rows,
                **{
                    theme: "data:image/png;base64," + base64.b64encode(png).decode()
                    for theme, png in figure.png.items()
                },
            }
            for figure in figures
        ],
    }
    return render("analysis", f"What {about.get('model', 'the model')} looks at", data)
