"""How many visual tokens a model's processor makes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from st3.tools.common.chats import ask, tokens

_IDS = ("image_token_id", "image_token_index")


def visual_tokens(config: Any, processor: Any, images: Sequence[Image.Image]) -> int:
    """The visual tokens of one prompt with these images, as the processor lays it out.

    Args:
        config: of the model.
        processor: of the model.
        images: of any sizes; what is in them does not matter.

    Raises:
        ValueError: the processor refuses the images, or a model whose visual tokens have no id of
            their own.
    """
    named = (getattr(config, name, None) for name in _IDS)
    ids = {one for one in named if isinstance(one, int)}
    if not ids:
        raise ValueError(f"{config.model_type}: its config does not name its visual tokens")
    row = tokens(processor, ask(images, "describe"))
    found = sum(row.count(one) for one in ids)
    if not found:
        raise ValueError(f"{config.model_type}: its processor writes no visual tokens into prompts")
    return found
