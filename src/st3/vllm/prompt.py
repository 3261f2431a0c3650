"""Where a request's images and videos stand, as scheduler and workers see it alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from st3.models.grids import Grids, grids_of

#: Why a request is never trimmed: it wants every row of its prompt.
WHOLE = "prompt_logprobs"


@dataclass(frozen=True)
class Prompt:
    """The facts of a request that trimming needs.

    Attributes:
        length: tokens of the prompt.
        runs: (start, end) of each unbroken run of visual tokens, in order.
        never: why it is never trimmed; None if it may be.
        grids: shapes of its images' grids of tokens, for scores that ask; empty where not known.

    A video is a run, or several, like any image.
    """

    length: int
    runs: tuple[tuple[int, int], ...]
    never: str | None = None
    grids: Grids = ()

    @classmethod
    def of(cls, length: int, features: Iterable[Any] | None, whole: bool = False) -> Prompt:
        """From vLLM's multimodal features. The prompt's very last token never counts as visual:
        its row ranks the others, so it must stay.

        Args:
            whole: whether every row of the prompt is wanted.
        """
        runs: list[tuple[int, int]] = []
        for start, end in sorted(_runs(features or ())):
            end = min(end, length - 1)
            if runs and runs[-1][1] == start < end:  # an image right behind another one
                runs[-1] = (runs[-1][0], end)
            elif start < end:
                runs.append((start, end))
        return cls(length, tuple(runs), WHOLE if whole else None)

    @cached_property
    def images(self) -> tuple[int, ...]:
        """Visual tokens of each run."""
        return tuple(end - start for start, end in self.runs)

    @cached_property
    def n_visual(self) -> int:
        return 0 if self.never else sum(self.images)

    @cached_property
    def positions(self) -> list[int]:
        """Places of the visual tokens."""
        return [place for start, end in self.runs for place in range(start, end)]

    def other_places(self, length: int) -> list[int]:
        """All places below ``length`` that hold no visual token."""
        ends = [0, *(place for run in self.runs for place in run), length]
        return [i for a, b in zip(ends[::2], ends[1::2], strict=True) for i in range(a, b)]

    def grids_from(self, features: Iterable[Any] | None) -> Grids:
        """The grids of its images, read off what vLLM's features hold for the encoder. Not known
        where the library does not know them either, so that both choose alike: of images beside
        videos that an encoder takes apart."""
        given = list(features or ())
        try:
            mixed = len({feature.modality for feature in given}) > 1
            if mixed and any("video_grid_thw" in feature.data for feature in given):
                return ()
            return grids_of([self.images], [r for f in given for r in _rasters(f)])
        except (AttributeError, KeyError, TypeError, ValueError):
            return ()


def _runs(features: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """(start, end) of the visual tokens of vLLM's multimodal features."""
    for feature in features:
        if feature.modality in ("image", "video"):
            for first, last in feature.mm_position.extract_embeds_range():
                yield int(first), int(last) + 1


def _rasters(feature: Any) -> Iterator[tuple[int, int]]:
    """Rows and columns of tokens: of each frame of flat patches, or of each square tile.

    Raises:
        AttributeError, KeyError, TypeError: what the encoder reads is not known, or not here.
        ValueError: tokens that are no rasters.
    """
    if feature.modality not in ("image", "video"):
        return
    data, number = feature.data, feature.mm_position.get_num_embeds()
    patches = f"{feature.modality}_grid_thw"
    if patches in data:
        frames, high, wide = map(int, data[patches].data.flatten().tolist())
        merge = math.isqrt(frames * high * wide // number)
        yield from [(high // merge, wide // merge)] * frames
        return
    if "image_sizes" in data:
        raise ValueError("tiles that the model packs, with newline tokens")
    pixels = data["pixel_values" if feature.modality == "image" else "pixel_values_videos"].data
    tiles = math.prod(pixels.shape[:-3])
    side = math.isqrt(number // tiles)
    if side * side * tiles != number:
        raise ValueError(f"{number} tokens are no squares on {tiles} tiles")
    yield from [(side, side)] * tiles
