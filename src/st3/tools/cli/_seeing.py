"""What the commands that draw share: places of visual tokens, and the recording of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from st3.models import UnknownPlaces
from st3.models import places as grid
from st3.tools.cli import _loading
from st3.tools.cli._common import CliError
from st3.tools.cli._loading import Loaded
from st3.tools.common.errors import first_line
from st3.tools.see.record import record


def places(
    loaded: Loaded,
    inputs: Any,
    pictures: Sequence[Image],
    prompt: str,
    system: str | None = None,
) -> list[grid.Place]:
    """Where the visual tokens of a prompt lie. Raises UnknownPlaces."""

    def process(drawn: list[Image]) -> Any:
        return _loading.prepare(loaded, drawn, prompt, system)

    return grid.places(loaded.model, inputs, pictures, process)


def places_or_why(
    loaded: Loaded,
    inputs: Any,
    pictures: Sequence[Image],
    prompt: str,
    system: str | None = None,
) -> tuple[list[grid.Place] | None, str]:
    """The places, or None and why they are not known."""
    try:
        return places(loaded, inputs, pictures, prompt, system), ""
    except UnknownPlaces as error:
        return None, str(error)


def save_run(
    folder: Path,
    loaded: Loaded,
    trimmer: Any,
    inputs: Any,
    pictures: Sequence[Image],
    max_new_tokens: int,
    result: dict[str, Any],
) -> None:
    """Answer once more, watched, and write what was seen; times are those of the run before, which
    ``result`` holds."""
    found, why_not = places_or_why(loaded, inputs, pictures, result["prompt"], result.get("system"))
    about = {key: str(result[key]) for key in ("model", "prompt", "conditions")}
    with _loading.quiet():
        run = record(
            trimmer, inputs, loaded.tokenizer, max_new_tokens, found, why_not, pictures, about
        )
    before = result.get("untrimmed", {})
    if before:
        run.about["untrimmed"] = str(before["answer"])
    how = f"median of {result['runs']} runs" if before else "one cold run"
    for name, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("whole answer", "total_ms")):
        if result[key] is not None:
            times = {"untrimmed": before.get(key), "trimmed": result[key]}
            run.costs.append({"name": f"{name}, {how}", "unit": "ms", **times})
    try:
        run.save(folder)
    except OSError as error:
        raise CliError(f"--save {folder}: {first_line(error)}") from error
