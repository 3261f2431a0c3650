"""What torch counts on real models, for the tests of the cost model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.zoo import FAMILIES, Family, I, T, build
from tests.zoo.base import TEXT

N_TEXT = 30
PYRAMID = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1]


def _llava_on(kind: str, **changes: Any) -> PreTrainedConfig:
    """The zoo's LLaVA with a decoder of another kind."""
    config = FAMILIES["llava"].make_config()
    llama = config.text_config.to_dict()
    shared = {name: llama[name] for name in TEXT if name in llama}
    config.text_config = AutoConfig.for_model(kind, **{**shared, **changes})
    return config


# Decoders that no vision-language family of the zoo has, and mixtures of experts.
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
OTHERS = {
    "phi": lambda: _llava_on("phi", num_key_value_heads=4),
    "starcoder2": lambda: _llava_on("starcoder2", sliding_window=20),
    "phi3": lambda: _llava_on("phi3"),
    "mixtral": lambda: _llava_on("mixtral", num_local_experts=4),
    "qwen2_moe": lambda: _llava_on("qwen2_moe", shared_expert_intermediate_size=28, **EXPERTS),
    "qwen3_moe": lambda: _llava_on(
        "qwen3_moe", mlp_only_layers=[1], decoder_sparse_step=2, **EXPERTS
    ),
}


def model_of(name: str) -> tuple[Family, PreTrainedModel]:
    if name in FAMILIES:
        family, model = build(name)
    else:
        family = replace(FAMILIES["llava"], name=name, make_config=OTHERS[name])
        model = family.model()
    model.set_experts_implementation("eager")  # the counter sees no grouped product
    return family, model


# The families that must be described with their vision tower, and others with a decoder, a mask or
# a cache of another kind.
REQUIRED = [
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "paligemma2",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
]
FURTHER = [
    "aya_vision",
    "exaone4_5",
    "gemma4",
    "gemma4_moe",
    "gemma4_per_layer",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "hunyuan_vl",
    "mistral3_window",
    "molmo2",
    "ovis2",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "video_llama_3",
    "vipllava",
]
DESCRIBED = [*REQUIRED, *(name for name in FURTHER if name in FAMILIES)]  # not all are in 5.16


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the text decoder's layers."""
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder.layers:
            return name, module
    raise AssertionError("the decoder's layers were not found")


def head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def one_image(
    name: str,
    attention: str,
    image: I = I(),  # noqa: B008
) -> tuple[PreTrainedModel, Any, int, int]:
    """A model, its inputs for one image, and how many text and visual tokens they have."""
    family, model = model_of(name)
    if attention == "sdpa" and not all(
        module._supports_sdpa for module in model.modules() if isinstance(module, PreTrainedModel)
    ):
        pytest.skip("transformers has no sdpa for this decoder")
    model.set_attn_implementation(attention)
    batch = family.inputs(model, [[T(N_TEXT - 10), image, T(10)]])
    visual = int(family.visual_mask(model, batch).sum())
    return model, batch, batch["input_ids"].shape[1] - visual, visual


def cpu_sdpa(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """torch counts 0 for the CPU's kernel. The arguments are shapes."""
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def held_bytes(cache: Any) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def count(model: nn.Module, call: Any = None, **inputs: Any) -> tuple[dict[str, int], Any]:
    """FLOPs per module as torch counts them, and the outputs."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: cpu_sdpa})
    model.requires_grad_(False)  # the counter follows gradients
    with torch.no_grad(), counter:
        outputs = (call or model)(**inputs)
    root = type(model).__name__ + "."
    flops = {
        name.removeprefix(root): sum(by_op.values())
        for name, by_op in counter.get_flop_counts().items()
    }
    return flops, outputs
