"""Run prompts through a model and watch it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from st3.models import family_of
from st3.models.places import Place
from st3.tools.see.collect import Collector
from st3.tools.see.result import Analysis, finish
from st3.tools.see.watch import Watch

Sample = tuple[Mapping[str, Any], Sequence[Place] | None]


@torch.no_grad()
def analyse(
    model: Any,
    samples: Iterable[Sample],
    max_new_tokens: int = 64,
    keep: float = 0.25,
    on_sample: Callable[[], None] = lambda: None,
) -> Analysis:
    """Answer prompts greedily with an untrimmed model, and measure what it looks at.

    The model's output is what it is without being watched; afterwards nothing is left on it. Memory
    for the measures does not depend on ``max_new_tokens``.

    Args:
        model: any supported ``AutoModelForImageTextToText``.
        samples: inputs of generate() for one prompt, and the places of its visual tokens in the
            images (:func:`st3.models.places.places`), or None.
        keep: share of the visual tokens in a kept set, for the overlaps.
        on_sample: called after each prompt.

    Raises:
        UnsupportedModelError: a model or attention kernel that st3 does not support.
        ValueError: no samples, or ``keep`` not between 0 and 1.
    """
    collector = Collector(len(family_of(model).parts(model).layers), keep)
    with Watch(model, collector):
        for inputs, places in samples:
            collector.place(places)
            model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            on_sample()
    return finish(collector)
