"""The vision tower of a model, on random pixels that give about the wanted visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from st3.models import config_family
from st3.tools.common.clock import Marks


def tower(model: Any, visual: int, batch: int) -> Callable[[], float] | None:
    """A function that runs the tower for ``batch`` rows of ``visual`` tokens and gives the seconds
    it took; None for families whose tower takes inputs that st3 cannot make."""
    inputs = config_family(model.config).bench_inputs(model, visual, batch)
    if inputs is None:
        return None

    @torch.no_grad()
    def run() -> float:
        marks = Marks(model.device)
        marks.mark()
        model.get_image_features(**inputs)
        marks.mark()
        return marks.seconds()[0]

    return run
