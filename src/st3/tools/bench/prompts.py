"""Prompts of given token counts, without pixels.

Plain token ids stand where the image's features would be, so that the decoder's prefill can be
timed without the vision tower, which is timed apart (:mod:`st3.tools.bench.tower`). st3 is told by
a mask which of them are visual tokens; to the decoder one token costs as much as another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One prompt: text tokens in all, and visual tokens of each image."""

    text: int
    images: tuple[int, ...]

    @property
    def visual(self) -> int:
        return sum(self.images)

    @property
    def length(self) -> int:
        return self.text + self.visual


@dataclass(frozen=True)
class Prompt:
    """A batch.

    Attributes:
        ids: [B, T] long.
        mask: [B, T] long, 0 at the padding of shorter rows (left); None if all are equally long.
        visual: [B, T] bool.
        rows: what is in it.
    """

    ids: Tensor
    mask: Tensor | None
    visual: Tensor
    rows: tuple[Row, ...]

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.ids.device


def uniform(batch: int, visual: int, text: int, images: int = 1) -> list[Row]:
    """``batch`` equal rows, their visual tokens in ``images`` parts as equal as can be."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return [Row(text, _split(visual, images))] * batch


def ragged(batch: int, visual: int, text: int) -> list[Row]:
    """Rows of which only the first has all the tokens: the others have down to half of the visual
    ones, in 1 to 3 images, and down to 5/8 of the text. Padded, the batch has the columns of a
    uniform one, so that the two can be compared."""
    if batch < 2:
        raise ValueError("a ragged batch needs at least two rows: use --batch 2 or more")
    rows = []
    for row in range(batch):
        share = 1 - 0.5 * row / (batch - 1)
        rows.append(Row(text - (row % 4) * text // 8, _split(round(visual * share), 1 + row % 3)))
    return rows


def build(rows: Sequence[Row], vocab: int, device: torch.device, seed: int = 0) -> Prompt:
    """Random tokens of a vocabulary of ``vocab``: half of a row's text, its images with one text
    token between them, the rest of the text.

    Raises:
        ValueError: no row, an empty one, or one with too little text to stand around its images.
    """
    if not rows or not all(row.length for row in rows):
        raise ValueError("a prompt needs at least one row, and each row a token")
    width = max(row.length for row in rows)
    visual = torch.zeros(len(rows), width, dtype=torch.bool)
    mask = torch.ones(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        gaps = max(0, len(row.images) - 1)
        if row.text < gaps + 2 and row.images:
            raise ValueError(
                f"{row.text} text tokens are too few around {len(row.images)} images: "
                f"use at least {gaps + 2}"
            )
        place = width - row.length
        mask[number, :place] = 0
        place += (row.text - gaps) // 2
        for tokens in row.images:
            visual[number, place : place + tokens] = True
            place += tokens + 1
    generator = torch.Generator(device).manual_seed(seed)
    # From the second quarter of the vocabulary: special tokens stand at its ends.
    ids = torch.randint(
        vocab // 4, vocab // 2, (len(rows), width), device=device, generator=generator
    )
    padded = bool((mask == 0).any())
    return Prompt(ids, mask.to(device) if padded else None, visual.to(device), tuple(rows))


def _split(total: int, parts: int) -> tuple[int, ...]:
    if total < parts or parts < 1:
        raise ValueError(f"{total} visual tokens cannot be split into {parts} images")
    size, rest = divmod(total, parts)
    return tuple(size + (part < rest) for part in range(parts))
