"""Downsampling: the image made smaller in place of tokens dropped, the baseline of every method.

Source: VTC-Bench (arXiv 2510.07143), which finds it ahead of many of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from st3.cost import TextDims, prefill_flops
from st3.models.places import image_token
from st3.tools.common.chats import Asker, Chat, ask

_SPARE = 1.15  # a patch size and merged patches leave no exact count


def shrunk(image: Image.Image, keep: float, back: bool) -> Image.Image:
    """A smaller image.

    Args:
        image: of any size.
        keep: share of the pixels that is left, 0..1; at least one row and column remain.
        back: bring it to its old size again; it then shows no more than the smaller one.
    """
    scale = math.sqrt(keep)
    wide, high = (max(1, round(scale * side)) for side in image.size)
    small = image.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC) if back else small


@dataclass(frozen=True)
class Share:
    """What a smaller image leaves: visual tokens, KV entries over the whole generation and prefill
    FLOPs, over the whole image's (FLOPs None: no cost model of this decoder)."""

    tokens: float
    kv: float
    flops: float | None


class Downsampler:
    """Makes images smaller, so that a model sees as much of them as a budget's tokens show.

    Where a smaller image gives about that share of the tokens (Qwen-VL, Pixtral), it stays small.
    Where a model makes as many tokens of any image (LLaVA), it is brought to its old size again: it
    shows what so many tokens would, and costs what all of them cost.
    """

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self._back: dict[tuple[tuple[int, int], float], bool] = {}

    def __call__(self, image: Image.Image, keep: float) -> Image.Image:
        """``image`` with ``keep`` (0..1) of what it shows."""
        key = (image.size, keep)
        if key not in self._back:
            whole, small = (
                self._tokens([ask([one], "")]) for one in (image, shrunk(image, keep, False))
            )
            self._back[key] = small > _SPARE * keep * whole
        return shrunk(image, keep, self._back[key])

    def share(
        self, whole: Sequence[Chat], small: Sequence[Chat], keep: float, new_tokens: int
    ) -> Share:
        """What conversations with smaller images leave of the cost of the whole ones.

        Args:
            whole: conversations with the images as they are.
            small: the same with smaller images.
            keep: the share of the pixels that ``small`` was made with.
            new_tokens: length of each answer.
        """
        lengths, visual = zip(*(self._lengths(chats) for chats in (whole, small)), strict=True)
        if lengths[0] == lengths[1]:
            return Share(keep, 1.0, 1.0)
        half = [sum(each) + len(each) * new_tokens / 2 for each in lengths]
        return Share(
            sum(visual[1]) / max(1, sum(visual[0])), half[1] / half[0], self._flops(lengths, visual)
        )

    def _flops(self, lengths: Sequence[list[int]], visual: Sequence[list[int]]) -> float | None:
        try:
            dims = TextDims.from_config(self.asker.model.config)
        except ValueError:
            return None
        whole, small = (
            sum(
                prefill_flops(dims, length - seen, seen).total
                for length, seen in zip(*pair, strict=True)
            )
            for pair in zip(lengths, visual, strict=True)
        )
        return small / whole

    def _tokens(self, chats: Sequence[Chat]) -> int:
        return sum(self._lengths(chats)[1])

    def _lengths(self, chats: Sequence[Chat]) -> tuple[list[int], list[int]]:
        """Tokens of each prompt, and its visual tokens."""
        inputs: Any = self.asker.encode(chats)
        ids: Tensor = inputs["input_ids"]
        there = inputs.get("attention_mask")
        length = (torch.ones_like(ids) if there is None else there).sum(1)
        visual = (ids == image_token(self.asker.model.config)).sum(1)
        return length.tolist(), visual.tolist()
