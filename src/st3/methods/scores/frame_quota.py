"""More tokens for the frames that differ, in each the least redundant: VidCom2's score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.schedule import check_share
from st3.methods.scores.base import Shape, Stage, TokenView
from st3.methods.scores.frame_change import column_of
from st3.methods.scores.grid import clips_of
from st3.methods.scores.registry import register

WIDTHS = tuple(2.0**k for k in range(-3, 2))  # of the Gaussians
TEMPERATURE = 0.01


@register
@dataclass(frozen=True)
class FrameQuota:
    """A token is redundant as far as it is like the mean of its video and that of its frame; frames
    whose tokens are unlike the video's mean have a larger part of what stays.

    Likeness is a sum of Gaussians of the distance, of unit vectors of that half of the channels
    which varies least over the video. Each frame keeps its quota of the least redundant tokens, and
    where the quotas do not add up to the wanted number, the least redundant of all make up for it.
    An image is a video of one frame.

    Args:
        keep: share of the visual tokens that stays, of which the quotas are parts.

    Source: VidCom2 (arXiv 2505.14454), as in vLLM. Departures: where a budget is shared, several
    videos make up for each other's quotas; a frame may lose all of its tokens to that.
    """

    keep: float = 0.25
    name: str = "vidcom2"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("grids",)

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def __call__(self, view: TokenView) -> Tensor:
        assert view.hidden is not None  # layer 0 always has embeddings
        columns = column_of(view)
        score = torch.zeros_like(view.visual, dtype=torch.float)
        for row, shapes in enumerate(clips_of(view)):
            first = 0
            for shape in shapes:
                count = math.prod(shape)
                of = columns[row, first : first + count]
                score[row, of] = self._of(view.hidden[row, of].float(), shape)
                first += count
        return score

    def _of(self, tokens: Tensor, shape: Shape) -> Tensor:
        """The score of one video's ``tokens`` [count, hidden size], [count]."""
        steady = tokens.var(dim=0, correction=0).topk(max(1, tokens.shape[1] // 2), largest=False)
        frames = tokens[:, steady.indices].unflatten(0, (shape[0] if len(shape) == 3 else 1, -1))
        frames = torch.nn.functional.normalize(frames, dim=-1)
        to_video = _likeness(frames, frames.mean(dim=(0, 1), keepdim=True))
        redundant = to_video + _likeness(frames, frames.mean(dim=1, keepdim=True))  # at most 10
        part = (-to_video.mean(dim=1) / TEMPERATURE).softmax(dim=0)
        share = (self.keep * (1 + part - part.mean())).clamp(max=1.0)
        quota = (share * frames.shape[1]).round().clamp_min(1)
        place = redundant.argsort(dim=1, stable=True).argsort(dim=1)
        return torch.where(place < quota[:, None], 16 - redundant, -redundant).flatten()


def _likeness(frames: Tensor, centre: Tensor) -> Tensor:
    """[frames, tokens, channels] and a centre for each -> [frames, tokens]."""
    distance = (frames - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(0)
