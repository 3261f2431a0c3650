"""``st3.heatmap``: what some layers kept of the images of the latest prompt, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from st3.models import places
from st3.tools.common.chats import ask, encode
from st3.tools.see.heatmap import choose_layers, draw

if TYPE_CHECKING:
    from st3.trimmer import Trimmer


def heatmap(
    trimmer: Trimmer,
    processor: Any,
    inputs: Mapping[str, Any],
    images: Image.Image | Sequence[Image.Image],
    *,
    layers: Sequence[int] | None = None,
    title: str | None = None,
    process: Callable[[list[Image.Image]], Mapping[str, Any]] | None = None,
) -> Image.Image:
    """Draw which patches of the images some decoder layers kept, in the latest prompt of a trimmed
    model: a row for each image, the image first, then a panel for each layer in which what it did
    not see is dimmed.

    Args:
        trimmer: what :func:`st3.trim` returned; its model has answered the prompt.
        processor: the model's.
        inputs: the prompt as the model was given it, one row.
        images: as the processor was given them, one or several.
        layers: which to draw, from 0; None: at most four at which the number of tokens changes.
        title: None: the policy.
        process: makes inputs of other images of the same sizes. It is needed only if the processor
            was called with arguments of its own: by it the place of each token is measured.

    Returns:
        the picture; a notebook shows it, ``.save("kept.png")`` keeps it.

    Raises:
        UnknownPlaces: where the visual tokens lie is not known for this model or prompt.
        TrimStateError: the model has not run a prompt with an image.
        ValueError: a layer that the model has not; images that do not belong to the prompt.
    """
    shown = [images] if isinstance(images, Image.Image) else list(images)
    report = trimmer.report
    kept = report.kept[0]
    drawn = choose_layers(kept, whole=report.n_visual[0]) if layers is None else list(layers)
    if process is None:

        def process(pictures: list[Image.Image]) -> Mapping[str, Any]:
            found: Mapping[str, Any] = encode(trimmer.model, processor, [ask(pictures, "describe")])
            return found

    found = places.places(trimmer.model, inputs, shown, process)
    if len(found) != report.n_visual[0]:
        raise ValueError(
            f"the inputs have {len(found)} visual tokens, and the latest prompt had "
            f"{report.n_visual[0]}: give the inputs that the model ran"
        )
    positions = {layer: report.kept_positions(layer).tolist() for layer in drawn}
    default = f"{report.policy}: patches kept at prefill; {len(kept)} layers, counted from 0"
    return draw(shown, found, positions, default if title is None else title)
