"""Worker side: the rows of one trimmed prompt that are left, and the score that they rank by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from st3.vllm.prompt import Prompt


class Columns:
    """The rows of one trimmed prompt that are left, and the score they rank by.

    Attributes:
        left: [N] of its rows (the prompt's, then what is computed again after a preemption).
        visual: [V], which of ``left`` are visual tokens.
        others: [N - V], the rest of them.
        ordinal: [V], their places among the prompt's original visual tokens.
        score: [V], what the next drop, and the cache's order, go by; None before it is taken.
        prepared: [1, prompt's columns], what the score has made of the embeddings.
    """

    def __init__(self, prompt: Prompt, length: int, device: torch.device) -> None:
        """``length`` rows: the prompt's, and of tokens behind it that are computed again."""
        self.prompt = prompt
        self.behind = length - prompt.length
        self.left = torch.arange(length, device=device)
        self.visual = to_device(prompt.positions, device)
        self.others = to_device(prompt.other_places(length), device)
        self.ordinal = torch.arange(len(self.visual), device=device)
        self.score: Tensor | None = None
        self.prepared: Tensor | None = None
        self._facts: dict[str, Any] | None = None

    def keep(self, count: int) -> Tensor:
        """Keep the best ``count`` visual tokens and all else; which of ``left`` these were."""
        chosen = self._ranked()[:count].sort().values
        kept = self.visual[chosen]
        stay = torch.cat([self.others, kept]).sort().values
        if self.prepared is not None:
            self.prepared = self.prepared[:, stay[: len(stay) - self.behind]]
        self.visual = torch.searchsorted(stay, kept)
        self.others = torch.searchsorted(stay, self.others)
        self.left, self.ordinal = self.left[stay], self.ordinal[chosen]
        self.score = None if self.score is None else self.score[chosen]
        self._facts = None
        return stay

    def importance(self) -> Tensor:
        """``left`` in the order of the cache: visual tokens by rising importance, then the rest."""
        return torch.cat([self.visual[self._ranked().flip(0)], self.others])

    def _ranked(self) -> Tensor:
        """Indices into ``visual``, the best first; the earlier of equals."""
        if self.score is None:
            raise RuntimeError("a drop without a score: this is a bug of st3")
        return torch.sort(self.score.nan_to_num(), descending=True, stable=True).indices

    def facts(self, layer: int, wanted: int | None) -> dict[str, Any]:
        """What every view says of the prompt's columns, [1, N]; see :class:`TokenView`."""
        if self._facts is None:  # the same until the next drop
            count, device = len(self.left) - self.behind, self.left.device
            visual = torch.zeros(1, count, dtype=torch.bool, device=device)
            visual[0, self.visual] = True
            ordinal = torch.zeros(1, count, dtype=torch.long, device=device)
            ordinal[0, self.visual] = self.ordinal
            self._facts = {
                "visual": visual,
                "ordinal": ordinal,
                "last": torch.full((1,), count - 1, device=device),
                "images": (self.prompt.images,),
                "grids": self.prompt.grids,
                "complete": len(self.visual) == len(self.prompt.positions),
                "at_end": True,
            }
        return {**self._facts, "layer": layer, "wanted": wanted, "prepared": self.prepared}


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers of the host on ``device``, without waiting for it."""
    made = torch.tensor(values, dtype=torch.long)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)
