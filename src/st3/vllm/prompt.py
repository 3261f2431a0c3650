"""Where a request's images stand in its prompt, as scheduler and workers see it alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from st3.models.grids import Grids, grids_of

#: Why a request is never trimmed: it wants every row of its prompt, or has a video (not tested).
WHOLE, VIDEO = "prompt_logprobs", "video"


@dataclass(frozen=True)
class Prompt:
    """The facts of a request that trimming needs.

    Attributes:
        length: tokens of the prompt.
        runs: (start, end) of each unbroken run of visual tokens, in order.
        never: why it is never trimmed; None if it may be.
        grids: shapes of its images' grids of tokens, for scores that ask; empty where not known.
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
        visual = [feature for feature in features or () if feature.modality in ("image", VIDEO)]
        with_video = any(feature.modality == VIDEO for feature in visual)
        runs = [
            (int(first), min(int(last) + 1, length - 1))
            for feature in visual
            for first, last in feature.mm_position.extract_embeds_range()
        ]
        never = WHOLE if whole else VIDEO if with_video else None
        return cls(length, tuple(sorted(run for run in runs if run[0] < run[1])), never)

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
        """The grids of its images, read off what vLLM's features hold for the encoder."""
        try:
            return grids_of([self.images], [r for f in features or () for r in _rasters(f)])
        except (AttributeError, KeyError, TypeError, ValueError):
            return ()


def _rasters(feature: Any) -> Iterator[tuple[int, int]]:
    """Rows and columns of tokens: of each frame of flat patches, or of each square tile.

    Raises:
        AttributeError, KeyError, TypeError: what the encoder reads is not known, or not here.
        ValueError: tokens that are no rasters.
    """
    data, number = feature.data, feature.mm_position.get_num_embeds()
    if "image_grid_thw" in data:
        frames, high, wide = map(int, data["image_grid_thw"].data.flatten().tolist())
        merge = math.isqrt(frames * high * wide // number)
        yield from [(high // merge, wide // merge)] * frames
        return
    if "image_sizes" in data:
        raise ValueError("tiles that the model packs, with newline tokens")
    tiles = math.prod(data["pixel_values"].data.shape[:-3])
    side = math.isqrt(number // tiles)
    if side * side * tiles != number:
        raise ValueError(f"{number} tokens are no squares on {tiles} tiles")
    yield from [(side, side)] * tiles
