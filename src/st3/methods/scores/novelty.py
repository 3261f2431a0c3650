"""Pixels that their neighbours do not predict: PixelPrune's score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from st3.methods.scores.base import Stage, TokenView
from st3.methods.scores.grid import Grid
from st3.methods.scores.registry import register


@register
@dataclass(frozen=True)
class Novelty:
    """The largest difference between a token's pixels and those that its neighbours predict; tokens
    that are predicted come behind all others, by an even grid.

    On each image (or tile), in reading order, a token is predicted to look like the one before it;
    like the one above it where an edge comes down, that is where the one above on the left looks
    like the one on the left and not like the one above; in the first column like the one above. One
    that is predicted within ``threshold`` stands from then on for what it was predicted by, so that
    errors do not add up.

    Args:
        threshold: the largest difference that counts as none, in the units of the pixel input.
        above: ``threshold``, where the tokens that are predicted are to leave, however many they
            are; None where the policy says how many stay.

    Source: PixelPrune (arXiv 2604.00886) and its code (``pred_2d``, by the largest difference).
    Departure: the code drops before the vision tower, which then never sees what is dropped.
    """

    threshold: float = 0.0
    above: float | None = None
    name: str = "pixelprune"
    stage: Stage = "embeds"
    needs: tuple[str, ...] = ("pixels", "grids")

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be a number from 0, got {self.threshold!r}")

    def of_pixels(self, cells: Tensor) -> Tensor:
        """How far the pixels of each token of a tile, [rows, columns, D], are from what is
        predicted; infinite for the first. [rows, columns]."""
        rows, columns, size = cells.shape
        cells = cells.float().reshape(-1, size)
        stands = cells  # what each token stands for
        far = cells.new_full((rows * columns,), math.inf)
        # Along a rising diagonal no token asks for another. What is equal stands for itself.
        last = rows + columns - 1 if self.threshold else 2
        for turn in range(1, last):
            here = self._turn(turn, rows, columns, cells.device)
            predicted = self._predicted(stands, here, columns)
            found = (cells[here] - predicted).abs().amax(-1)
            far = far.index_copy(0, here, found)
            if self.threshold:
                known = (found <= self.threshold)[:, None]
                stands = stands.index_copy(0, here, torch.where(known, predicted, cells[here]))
        return far.view(rows, columns)

    def _turn(self, turn: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """The tokens that are looked at together: those of a diagonal, or all but the first."""
        if not self.threshold:
            return torch.arange(1, rows * columns, device=device)
        row = torch.arange(max(0, turn - columns + 1), min(rows, turn + 1), device=device)
        return row * columns + turn - row

    def _predicted(self, stands: Tensor, here: Tensor, columns: int) -> Tensor:
        row, column = here // columns, here % columns
        left = stands[(here - 1).clamp_min(0)]
        above = stands[(here - columns).clamp_min(0)]
        corner = stands[(here - columns - 1).clamp_min(0)]
        edge = self._alike(corner, left) & ~self._alike(corner, above)
        take_above = (column == 0) | ((row > 0) & edge)
        return torch.where(take_above[:, None], above, left)

    def _alike(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().amax(-1) <= self.threshold

    def __call__(self, view: TokenView) -> Tensor:
        assert view.tower is not None  # the engine gives it or refuses
        return torch.where(view.tower > self.threshold, view.tower, Grid()(view))
