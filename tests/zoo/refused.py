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
    # An index of its own chooses which keys a query sees, over positions of the whole sequence.
    (make.glm5_next, "index", ""),
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
    "inkling2": "KV entries and a convolution's state in every layer",
    "inkling2_loop": "KV entries and a convolution's state in every layer",
    "inkling_mm_model": "needs scipy to build; as inkling2",
    "instructblipvideo": "as instructblip, with frames",
    "llama4": "transformers 5.24.0's own forward fails (other versions have it)",
    "mistral4": "text only",
    "pi0": "robot actions, not text",
    "pp_formulanet": "encoder-decoder",
    "qwen4_exp": "linear attention and a sparse index, like glm5_next",
    "shieldgemma2": "Gemma3ForConditionalGeneration behind a classifier",
}
