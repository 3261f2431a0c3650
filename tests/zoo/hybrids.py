"""Families whose decoder layers are not all alike: states, shared KV entries, late image features.

They are not among ``FAMILIES``: the reference of those hides tokens, which a state cannot be judged
by. Theirs is :mod:`tests.slow_hybrids`.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .base import (
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Batch,
    Family,
    I,
    Vision,
    text,
    vision,
)  # fmt: skip
from .gemma4 import Gemma4, gemma4_shared
from .llava import clip
from .qwen import QWEN_IDS, Qwen3VL, QwenVL, rope
from .refused_configs import IDS, LINEAR, sub


class Delta(Qwen3VL):
    """A gated delta net in three of four layers."""

    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        slower_decay(model)


def slower_decay(model: PreTrainedModel) -> None:
    """Random decays are so fast that the sums of their logarithms over a chunk cost three digits:
    then even the bare model's padded rows are off by 3e-4."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.add_(math.log(0.05))


class Lfm2Vl(Family):
    """I(h, w) in tokens, of 2 by 2 patches; patches of all images are padded to one number."""

    most = 480

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        n = 4 * h * w
        values = torch.zeros(1, self.most, 3 * 4 * 4)
        values[0, :n] = torch.randn(n, 48, generator=rng)
        mask = torch.zeros(1, self.most, dtype=torch.long)
        mask[0, :n] = 1
        tensors = {
            "pixel_values": values,
            "spatial_shapes": torch.tensor([[2 * h, 2 * w]]),
            "pixel_attention_mask": mask,
        }
        return Vision([VISION_START, *[IMAGE] * (h * w), VISION_END], tensors)


class MiniCpm(Delta):
    """I(h, w) in tokens, of 4 by 4 patches: all patches of a batch lie in one long strip."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        tensors = {
            "pixel_values": torch.randn(1, 3, 4, 4 * 16 * h * w, generator=rng),
            "target_sizes": torch.tensor([[4 * h, 4 * w]], dtype=torch.int),
        }
        return Vision([VISION_START, *[IMAGE] * (h * w), VISION_END], tensors)

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {}

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        images = [vision.tensors for row in per_row for vision in row]  # fmt: skip
        if not images:
            return {}
        return {
            "pixel_values": torch.cat([image["pixel_values"] for image in images], -1),
            "target_sizes": torch.cat([image["target_sizes"] for image in images]),
        }


class MiniCpm46(MiniCpm):
    """transformers 5.16's own tower wants patches in another order than what came after it."""

    @property
    def available(self) -> bool:
        return super().available and not tr.__version__.startswith("5.16.")


class CpmOcr(MiniCpm):
    """I(h, w) in tokens, of 2 by 2 patches."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        found = super().image(model, segment, rng)
        pixels, sizes = found.tensors["pixel_values"], found.tensors["target_sizes"]
        found.tensors["pixel_values"] = pixels[..., : pixels.shape[-1] // 4]
        found.tensors["target_sizes"] = sizes // 2
        return found


class CanvasCpm(MiniCpm):
    """Positions go by where a slice lies on its image."""

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


class Lfm3Vl(QwenVL):
    """I(h, w) in tokens, of 2 by 2 patches; no positions of its own."""

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        return {}


class Towerless(Family):
    """Without its vision tower: ``pixel_values`` are the 12 embeddings of each image. The tower is
    of no account to the decoder, and one of them needs timm."""

    tokens = 12

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        values = torch.randn(1, self.tokens, 32, generator=rng)
        return Vision([VISION_START, *[IMAGE] * self.tokens, VISION_END], {"pixel_values": values})

    def encode(self, pixel_values: Tensor) -> Any:
        """What the model's ``get_image_features`` returns."""
        return SimpleNamespace(pooler_output=pixel_values)

    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        holder = getattr(model, "model", model)
        inner = type(holder)
        features = {
            "get_image_features": lambda _, pixel_values, *args, **kwargs: self.encode(pixel_values)
        }
        names = {**features, "__module__": inner.__module__}
        holder.__class__ = type(inner.__name__, (inner,), names)


class Gemma3n(Towerless):
    """Streams of hidden states, inputs for each layer, and the last layers share KV entries."""


class Each(Towerless):
    """Features of one image after the other."""

    def encode(self, pixel_values: Tensor) -> Any:
        return BaseModelOutputWithPooling(pooler_output=tuple(pixel_values))


class Nemotron(Each):
    """One mixer a layer."""

    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        slower_decay(model)


class Granite(Towerless):
    """Image features are added before most layers, those that drop tokens among them."""

    levels = (0, 2, 3, 4, 5, 6)

    def encode(self, pixel_values: Tensor) -> Any:
        rng = torch.Generator().manual_seed(7)
        mixes = {level: torch.randn(32, 32, generator=rng) / 32**0.5 for level in self.levels}
        late = [
            (level, [image @ mix.to(image.dtype) for image in pixel_values])
            for level, mix in mixes.items()
        ]
        return SimpleNamespace(pooler_output=list(pixel_values), deepstack_features=late)


def _qwen3_5() -> PreTrainedConfig:
    return tr.Qwen3_5Config(
        vision_config=vision(sub("qwen3_5", "vision_config"), num_position_embeddings=64),
        text_config=text(sub("qwen3_5", "text_config"), rope_parameters=rope((2, 1, 1)), **LINEAR),
        **QWEN_IDS,
    )


def _qwen3_5_moe() -> PreTrainedConfig:
    return tr.Qwen3_5MoeConfig(
        vision_config=vision(sub("qwen3_5_moe", "vision_config"), num_position_embeddings=64),
        text_config=text(
            sub("qwen3_5_moe", "text_config"),
            rope_parameters=rope((2, 1, 1)),
            shared_expert_intermediate_size=16,
            **LINEAR,
        ),
        **QWEN_IDS,
    )


def _lfm2_vl() -> PreTrainedConfig:
    return tr.Lfm2VlConfig(
        vision_config=vision(tr.Siglip2VisionConfig, num_patches=64),
        text_config=text(tr.Lfm2Config, layer_types=["conv", "conv", "full_attention", "conv"] * 2),
        projector_hidden_size=32,
        **IDS,
    )


def _minicpmv4_6() -> PreTrainedConfig:
    return tr.MiniCPMV4_6Config(
        vision_config=vision(sub("minicpmv4_6", "vision_config"), insert_layer_id=0),
        text_config=text(sub("qwen3_5", "text_config"), rope_parameters=rope((2, 1, 1)), **LINEAR),
        insert_layer_id=0,
        image_size=16,
        video_token_id=VIDEO,
        **IDS,
    )


def _lfm3_vl() -> PreTrainedConfig:
    return tr.Lfm3VlConfig(
        vision_config=vision(
            sub("lfm3_vl", "vision_config"),
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["conv", "full_attention"],
        ),
        text_config=text(
            sub("lfm3_vl", "text_config"),
            layer_types=[
                "conv",
                "conv",
                "full_attention",
                "conv",
                "conv",
                "sliding_attention",
                "full_attention",
                "conv",
            ],
            sliding_window=16,
        ),
        projector_hidden_size=32,
        **QWEN_IDS,
    )


def _minicpmv4_7() -> PreTrainedConfig:
    return tr.MiniCPMV4_7Config(
        vision_config=vision(sub("minicpmv4_7", "vision_config"), insert_layer_id=0),
        text_config=text(sub("qwen3_5", "text_config"), rope_parameters=rope((2, 1, 1)), **LINEAR),
        insert_layer_id=0,
        image_size=16,
        video_token_id=VIDEO,
        image_start_id=VISION_START,
        image_end_id=VISION_END,
        slice_start_id=16,
        slice_end_id=17,
        newline_id=18,
        **IDS,
    )


def _minicpm_ocr() -> PreTrainedConfig:
    return tr.MiniCPMOcrConfig(
        vision_config=vision(sub("minicpm_ocr", "vision_config"), insert_layer_id=0),
        text_config=text(sub("qwen3_5", "text_config"), rope_parameters=rope((2, 1, 1)), **LINEAR),
        insert_layer_id=0,
        video_token_id=VIDEO,
        **IDS,
    )


def _gemma3n() -> PreTrainedConfig:
    config = tr.Gemma3nConfig(
        vision_config={"hidden_size": 16, "vocab_size": 8, "vocab_offset": 120},
        audio_config={"hidden_size": 16, "vocab_size": 8, "vocab_offset": 128,
                      "input_feat_size": 16, "conf_num_hidden_layers": 1,
                      "conf_num_attention_heads": 2, "sscp_conv_channel_size": [4, 4]},
        text_config=text(
            sub("gemma3n", "text_config"),
            num_kv_shared_layers=3,
            sliding_window=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=120,
            laurel_rank=8,
        ),
        image_token_id=IMAGE,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
    )  # fmt: skip
    tower_ = tr.ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic")
    for key in ("hidden_size", "vocab_size", "vocab_offset", "rms_norm_eps"):
        setattr(tower_, key, getattr(config.vision_config, key))
    config.__dict__["vision_config"] = tower_  # in place of the timm tower (needs that package)
    return config


def _granite4_vision() -> PreTrainedConfig:
    from transformers.models.granite4_vision.configuration_granite4_vision import (
        Granite4VisionTextConfig,
    )

    tower_ = clip(16)
    tower_.hidden_size = 64
    return tr.Granite4VisionConfig(
        vision_config=tower_,
        text_config=text(Granite4VisionTextConfig),
        qformer_config={"model_type": "blip_2_qformer", "hidden_size": 64,
                        "encoder_hidden_size": 64, "num_attention_heads": 1,
                        "num_hidden_layers": 1,
                        "intermediate_size": 16, "cross_attention_frequency": 1,
                        "max_position_embeddings": 64, "use_qformer_text_input": False},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
        downsample_rate="2/4",
        deepstack_layer_map=[[-1, 0], [-2, 2]],
        spatial_target_layers=[3, 4, 5, 6],
    )  # fmt: skip


def _apertus1p5() -> PreTrainedConfig:
    config = tr.Apertus1p5Config(
        vision_config={"codebook_size": 8, "embed_dim": 4, "latent_channels": 4,
                       "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
                       "attn_resolutions": []},
        audio_config={"model_type": "wavtokenizer_encoder", "codebook_size": 8},
        text_config=text(
            sub("apertus1p5", "text_config"),
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        image_token_id=IMAGE,
        audio_token_id=17,
        image_token_offset=30,
        audio_token_offset=38,
    )  # fmt: skip
    # In place of what makes tokens of sounds, which cannot be built small.
    config.__dict__["audio_config"] = tr.ResNetConfig(
        embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic"
    )
    return config


def _nemotron_h_omni() -> PreTrainedConfig:
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention"]
    kinds += ["moe", "full_attention", "linear_attention", "full_attention"]
    return tr.NemotronH_Omni_Reasoning_V3_Config(
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "patch_size": 4, "image_size": 8, "max_img_size": 16,
                       "video_temporal_patch_size": 2},
        text_config={"vocab_size": VOCAB, "hidden_size": 32, "layers_block_type": kinds,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                     "intermediate_size": 48, "ssm_state_size": 8, "mamba_num_heads": 4,
                     "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 64,
                     "n_routed_experts": 4, "moe_intermediate_size": 16,
                     "moe_shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
                     "pad_token_id": 0},
        audio_config=None,
        vision_hidden_size=16,
        projector_hidden_size=16,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=17,
    )  # fmt: skip


LIVELY: dict[str, Any] = {"dynamic_size": True, "gain": 1.2}
FAMILIES = [
    Delta("qwen3_5", _qwen3_5, supports_video=True, **LIVELY),
    Delta("qwen3_5_moe", _qwen3_5_moe, supports_video=True, **LIVELY),
    MiniCpm46("minicpmv4_6", _minicpmv4_6, **LIVELY),
    Lfm2Vl("lfm2_vl", _lfm2_vl, dynamic_size=True),
    CanvasCpm("minicpmv4_7", _minicpmv4_7, **LIVELY),
    CpmOcr("minicpm_ocr", _minicpm_ocr, **LIVELY),
    Lfm3Vl("lfm3_vl", _lfm3_vl, dynamic_size=True),
    Gemma4(
        "gemma4_shared", gemma4_shared, model_type="gemma4", supports_video=True,
        dynamic_size=True, gain=1.1,
    ),
    Gemma3n("gemma3n", _gemma3n, attention="eager"),
    Granite("granite4_vision", _granite4_vision),
    Each("apertus1p5", _apertus1p5),
    Nemotron("nemotron_h_omni", _nemotron_h_omni),
]  # fmt: skip
