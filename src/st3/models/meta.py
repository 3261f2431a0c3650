"""A model without its weights, to count what its config costs."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from st3.cost.count import count_text
from st3.cost.dims import TextDims
from st3.errors import UnsupportedModelError
from st3.models.decoders import DESCRIBED
from st3.models.parts import Parts, decoder_parts

if TYPE_CHECKING:
    from st3.models.base import Family

_counted: dict[str, TextDims] = {}  # a model is counted once; it takes up to a second


def counted(family: Family, config: Any) -> TextDims:
    """The dimensions of a decoder, counted on the modules that its config describes.

    Raises:
        ValueError: if that cannot be done.
    """
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _counted:
        if len(_counted) > 64:
            _counted.clear()
        _counted[key] = _count(family, config)
    return _counted[key]


def _count(family: Family, config: Any) -> TextDims:
    text = config.get_text_config(decoder=True)
    try:
        parts = _parts(family, config)
    except (UnsupportedModelError, ValueError, ImportError) as error:
        raise ValueError(
            f"no cost model for the decoder {text.model_type!r}: {error}. Decoders with a closed "
            f"form: {', '.join(DESCRIBED)}; others are counted if st3 can trim them. Describe "
            "another one with TextDims(...) by hand"
        ) from error
    lookahead = [family.lookahead(text, window) for window in parts.windows]
    return count_text(parts.text, parts.layers, parts.attentions, parts.windows, lookahead)


def _parts(family: Family, config: Any) -> Parts:
    config = copy.deepcopy(config)  # building a model sets its attention, which a living one shares
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    with torch.device("meta"):
        if config.model_type not in kinds:
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        else:
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    model.requires_grad_(False).eval()
    # Experts must be chosen without looking at numbers.
    model.set_experts_implementation("batched_mm")
    if config.model_type in kinds:
        return family.parts(model)
    text = model.get_decoder()
    if not hasattr(text, "layers"):
        raise UnsupportedModelError(f"{type(text).__name__} has no list of decoder layers")
    return decoder_parts(text, text, config.model_type)
