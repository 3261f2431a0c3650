"""What each layer saw of a prompt's images, for clients that ask with ``"st3": {"kept": true}``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from st3.models import UnknownPlaces
from st3.models.places import Place, places
from st3.report import Report
from st3.tools.serve.errors import refused

MAX_TOKENS = 8192
"""Visual tokens of a prompt, at most: with its place each takes about 40 bytes of the response."""

MEMORY = 2
"""Times the memory of preparing images that it takes to find the places: the processor runs on
drawn images of the same sizes, one after another, and its results are held."""

Messages = Sequence[dict[str, Any]]
Tokenise = Callable[[Messages], Any]


@dataclass(frozen=True)
class Spots:
    """Where the visual tokens of a prompt lie. places: None where that is not known; why: then."""

    places: tuple[Place, ...] | None
    why: str = ""


def spots_of(model: Any, inputs: Any, visual: int, messages: Messages, tokenise: Tokenise) -> Spots:
    """The places of the visual tokens of a conversation.

    Args:
        inputs: what ``tokenise`` made of ``messages``.
        visual: its visual tokens.

    Raises:
        ServeError: more visual tokens than :data:`MAX_TOKENS`.
    """
    if visual > MAX_TOKENS:
        raise refused(
            f"st3.kept is given for prompts of up to {MAX_TOKENS} visual tokens; this one has "
            f"{visual}",
            "st3.kept",
        )
    pictures = [
        part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"
    ]
    if not pictures:
        return Spots(None, "the prompt has no image")
    try:
        found = places(model, inputs, pictures, lambda drawn: tokenise(_with(messages, drawn)))
    except UnknownPlaces as error:
        return Spots(None, str(error))
    return Spots(tuple(found))


def _with(messages: Messages, pictures: Sequence[Image]) -> list[dict[str, Any]]:
    """The same conversation about other pictures."""
    left = iter(pictures)
    return [
        {
            **turn,
            "content": [
                {**part, "image": next(left)} if part["type"] == "image" else part
                for part in turn["content"]
            ],
        }
        for turn in messages
    ]


def kept_of(spots: Spots, report: Report) -> dict[str, Any]:
    """The field ``st3.kept`` of a response, plain values.

    Returns:
        ``layers``: the decoder's; ``seen_by``: for each visual token, in the prompt's order, how
        many layers saw it at prefill: the first so many, as what is dropped does not come back;
        ``places``: for each of them the image's number from 0, then left, top, right and bottom as
        shares of its width and height, or the number alone for a token that stands for no part of
        it; null if not known, and ``unplaced`` says why.
    """
    layers = report.schedule.num_layers
    seen = torch.zeros(report.n_visual[0], dtype=torch.long)
    for layer in range(layers):
        seen[report.kept_positions(layer)] += 1
    found, why = spots.places, spots.why
    if found is not None and len(found) != len(seen):
        why = f"{len(seen)} visual tokens, but places of {len(found)}"
        found = None
    return {
        "layers": layers,
        "seen_by": seen.tolist(),
        "places": None
        if found is None
        else [[p.picture, *(round(v, 4) for v in p.box or ())] for p in found],
        "unplaced": why,
    }


def nothing(layers: int) -> dict[str, Any]:
    """The same of a prompt without an image."""
    return {"layers": layers, "seen_by": [], "places": None, "unplaced": "the prompt has no image"}
