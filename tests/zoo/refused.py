"""Families in which visual tokens cannot be taken out of the decoder layers, or not yet.

``REFUSED[name] = (factory of a tiny model, keyword of the reason)``; ``UNTRIED[name]`` says why
there is no tiny model here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from . import refused_configs as make
from .gemma4 import gemma4_shared


def _factory(make_config: Callable[[], PreTrainedConfig]) -> Callable[[], PreTrainedModel]:
    def factory() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForImageTextToText.from_config(make_config()).eval()

    return factory


# (config, keyword of the reason, model type where it is not the function's name)
_REASONS: list[tuple[Callable[[], PreTrainedConfig], str, str]] = [
    (make.mllama, "cross-attention", ""),
    (make.idefics, "cross-attention", ""),
    (make.blip, "cross-attention", ""),
    (make.florence2, "encoder-decoder", ""),
    (make.pix2struct, "encoder-decoder", ""),
    (make.t5gemma2, "encoder-decoder", ""),
    (make.udop, "encoder-decoder", ""),
    (make.vision_encoder_decoder, "encoder-decoder", "vision-encoder-decoder"),
    # Image features take positions that a mask argument names, or stand before the text: there is
    # no placeholder token, and these decoders have no attention interface with a KV cache of ours.
    (make.kosmos2, "placeholder", "kosmos-2"),
    (make.kosmos2_5, "placeholder", "kosmos-2.5"),
    (make.git, "placeholder", ""),
    # Later layers read the keys and values of an earlier one, whose tokens they would have to keep.
    (gemma4_shared, "shared", "gemma4"),
    (make.gemma3n, "shared", ""),
    # A recurrent or convolutional state mixes tokens in order; none can be hidden from it later.
    (make.glm5_next, "linear attention", ""),
    # Image features are added between late layers, inside the decoder's own loop.
    (make.granite4_vision, "deepstack", ""),
    # An index of its own chooses which keys a query sees, over positions of the whole sequence.
    (make.mistral_large4, "index", ""),
    (make.minimax_m3_vl, "index", ""),
    (make.unlimited_ocr, "sliding", ""),  # a window over the answer, in a cache layer of its own
    (make.diffusion_gemma, "diffusion", ""),
]
REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    config.__name__: (_factory(config), reason)
    for config, reason, model_type in _REASONS
    if (model_type or config.__name__) in CONFIG_MAPPING_NAMES
}
UNTRIED: dict[str, str] = {
    "dots3_note": "latent attention with a sparse index, like mistral_large4",
    "evolla": "proteins, not images",
    "glmga": "Glm46VForConditionalGeneration, as in glm46v",
    "inkling2": "convolutions in every layer, like lfm2_vl",
    "inkling_mm_model": "needs scipy to build; convolutions in every layer, like lfm2_vl",
    "instructblipvideo": "as instructblip, with frames",
    "lfm3_vl": "convolutions, like lfm2_vl",
    "minicpm_ocr": "the decoder of qwen3_5",
    "minicpmv4_7": "the decoder of qwen3_5",
    "mistral4": "text only",
    "nemotron_h_omni": "Mamba layers: a recurrent state, like linear attention",
    "pi0": "robot actions, not text",
    "pp_formulanet": "encoder-decoder",
    "qwen4_exp": "linear attention, like qwen3_5",
    "shieldgemma2": "Gemma3ForConditionalGeneration behind a classifier",
}
