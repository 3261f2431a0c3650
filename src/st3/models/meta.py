"""A model without its weights, to count what its config costs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from st3.cost.count import count_flops, count_text
from st3.cost.dims import TextDims
from st3.errors import UnsupportedModelError
from st3.models.decoders import DESCRIBED
from st3.models.parts import Parts, decoder_parts

if TYPE_CHECKING:
    from st3.models.base import Family

_FAILED = (
    UnsupportedModelError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    AttributeError,
    ImportError,
)
_counted: dict[str, TextDims] = {}  # a model is counted once; it takes up to a second


def counted(family: Family, config: Any) -> TextDims:
    """The dimensions of a decoder, counted on the modules that its config describes, on torch's
    meta device.

    Args:
        family: of the config.
        config: of the whole model.

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
    dims = count_text(
        parts.text, parts.layers, parts.mixers, parts.windows, lookahead, parts.sources
    )
    return replace(dims, in_order=parts.in_order)


def counted_crop(family: Family, config: Any, why: ValueError) -> tuple[int, int]:
    """FLOPs of the vision tower and its projector for one crop, and the tokens that it becomes.

    Args:
        family: of the config.
        config: of the whole model.
        why: there is no closed form.

    Raises:
        ValueError: ``why``, if it cannot be counted either.
    """
    try:
        inputs = family.layout.crop(config)
        if inputs is None:
            raise why
        encode = family.parts(_bare(config)).inner.get_image_features
        flops, made = count_flops(lambda: encode(**inputs, return_dict=True))
        features = getattr(made, "pooler_output", made)
        images = features if isinstance(features, (list, tuple)) else [features]
        return flops, sum(image.numel() // image.shape[-1] for image in images)
    except _FAILED as error:
        raise why from error


def _bare(config: Any) -> Any:
    """The model of a config, on the meta device."""
    config = copy.deepcopy(config)  # building a model sets its attention, which a living one shares
    auto = AutoModelForImageTextToText if _is_visual(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = auto.from_config(config, attn_implementation="eager")
    return model.requires_grad_(False).eval()


def _is_visual(config: Any) -> bool:
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _parts(family: Family, config: Any) -> Parts:
    model = _bare(config)
    # Experts must be chosen without looking at numbers.
    model.set_experts_implementation("batched_mm")
    if _is_visual(config):
        return family.parts(model)
    text = model.get_decoder()
    if not hasattr(text, "layers"):
        raise UnsupportedModelError(f"{type(text).__name__} has no list of decoder layers")
    return decoder_parts(text, text, config.model_type)
