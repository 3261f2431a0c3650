"""What a score says of the pixels that a model's images are encoded from, per visual token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from st3.errors import UnsupportedModelError
from st3.hf.hooks import Hooks
from st3.models import encoder
from st3.models.layouts import Layout, Tile, UnknownPlaces
from st3.models.visual import at_visual, tokens_of

REMEDY = "use a policy that does not look at pixels, such as grid or divprune"
OfPixels = Callable[[Tensor], Tensor]
_NOT_UNDERSTOOD = (UnknownPlaces, KeyError, IndexError, RuntimeError, AttributeError, TypeError)


class _Heard(threading.local):
    """What a thread has encoded for its next prompt: see :mod:`st3.models.tower_attention`."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []


class PixelTap:
    """Listens to the encoder of a model's images.

    Args:
        model, inner: the model, and the model inside, which has the encoder.
        layout: how its images are cut into tokens.
        of_pixels: a function of the pixels of each token of a tile, [rows, columns, D], that gives
            a number for each of them.

    Raises:
        UnsupportedModelError: a model whose tokens cannot be followed to their pixels.
    """

    def __init__(self, model: Any, inner: Any, layout: Layout, of_pixels: OfPixels) -> None:
        self.model, self.inner, self.layout, self.of_pixels = model, inner, layout, of_pixels
        if not layout.placed or not hasattr(inner, "get_image_features"):
            raise UnsupportedModelError(
                f"{model.config.model_type}: which pixels a visual token is made of is not known: "
                + REMEDY
            )
        self._heard = _Heard()

    def listen(self, hooks: Hooks) -> None:
        """Listen on this instance alone."""
        encoder.listen(hooks, self.inner, self._note)

    def take(self, visual: Tensor) -> Tensor:
        """What was found, [1, B, T], at the visual tokens [B, T] bool of the prompt under way;
        infinite for tokens that no pixels stand for (newlines).

        Raises:
            UnsupportedModelError: for videos, and where the images were encoded elsewhere.
        """
        values = self._heard.values
        flat = torch.cat(values) if values else torch.zeros(0, device=visual.device)
        self.end()
        found = at_visual(flat[None], visual)
        if found is None:
            raise UnsupportedModelError(
                f"the pixels of {len(flat)} visual tokens were seen, but the prompt has "
                f"{int(visual.sum())} (videos, or ready-made image features): {REMEDY}"
            )
        return found

    def end(self) -> None:
        """Forget what this thread has heard."""
        self._heard.values.clear()

    def _note(self, video: bool, inputs: dict[str, Any], result: Any) -> None:
        # What an earlier call left is of no prompt any more.
        self.end()
        if not video:
            self._heard.values.append(self._values(inputs, tokens_of(result)))

    @torch.no_grad()
    def _values(self, inputs: dict[str, Any], n_tokens: int) -> Tensor:
        """[tokens] of one call of the encoder."""
        model, layout = self.model, self.layout
        try:
            tiles = layout.tiles(model, inputs, n_tokens)
            values = [self.of_pixels(_cells(tile)).flatten()[:, None] for tile in tiles]
            found = layout.arrange(model, inputs, tiles, values)[:, 0]
        except _NOT_UNDERSTOOD as error:
            raise UnsupportedModelError(
                f"{model.config.model_type}: which pixels a visual token is made of was not "
                f"found: {REMEDY}"
            ) from error
        return torch.where(found.isnan(), float("inf"), found)


def _cells(tile: Tile) -> Tensor:
    """The pixels of each token of a tile, [rows, columns, D]; what stands over at the right and at
    the bottom, which the model's convolution leaves out, is left out."""
    high, wide = tile.pixels.shape[1] // tile.rows, tile.pixels.shape[2] // tile.columns
    pixels = tile.pixels[:, : tile.rows * high, : tile.columns * wide]
    cells = pixels.unflatten(2, (tile.columns, wide)).unflatten(1, (tile.rows, high))
    return cells.permute(1, 3, 0, 2, 4).flatten(2)
