"""Write a run's JSON, Markdown and pictures into a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st3.tools.bench.report import as_markdown, to_dict
from st3.tools.bench.suite import Result
from st3.tools.common.conditions import in_words


def save(
    results: Sequence[Result],
    conditions: dict[str, Any],
    folder: Path,
    name: str,
    plots: bool = True,
) -> list[Path]:
    """Write ``<name>.json``, ``<name>.md`` and a picture for each workload; the paths written.

    Raises:
        ValueError: matplotlib is missing and ``plots`` are wanted (JSON and Markdown are there).
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(json.dumps(to_dict(results, conditions), indent=1) + "\n", encoding="utf-8")
    pictures = [folder / f"{name}-{slug}.png" for slug in _slugs(results)]
    text = as_markdown(results, conditions, name)
    if plots:
        text += "".join(f"\n![{p.stem}]({p.name})\n" for p in pictures)
    page.write_text(text, encoding="utf-8")
    written = [data, page]
    if plots:
        from st3.tools.bench.plot import draw

        for result, picture in zip(results, pictures, strict=True):
            draw(result, picture, in_words(conditions))
            written.append(picture)
    return written


def _slugs(results: Sequence[Result]) -> list[str]:
    """A name for each; a workload that comes again, with other methods, has a number behind it."""
    slugs = [_slug(result) for result in results]
    counts = [slugs[: i + 1].count(slug) for i, slug in enumerate(slugs)]
    return [slug if n == 1 else f"{slug}-{n}" for slug, n in zip(slugs, counts, strict=True)]


def _slug(result: Result) -> str:
    work = result.workload
    parts = [result.subject, f"b{work.batch}", f"v{work.visual}", f"n{work.new_tokens}"]
    return re.sub(r"[^\w.-]", "-", "-".join(parts + ["ragged"] * work.ragged))
