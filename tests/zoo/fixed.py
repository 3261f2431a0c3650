"""Models with images of one size in front of a LLaMA-like decoder."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import BREAK, IMAGE, VISION_END, VISION_START, I, Vision, accepts, pixels, text, vision
from .llava import FixedSize, siglip


class Wrapped(FixedSize):
    """Start and end tokens around the image."""

    before, after = (VISION_START,), (VISION_END,)


class Big(Wrapped):
    """64 patches, of which a pixel shuffle makes 16 tokens."""

    side, tokens = 32, 16


def _ovis2() -> PreTrainedConfig:
    from transformers.models.ovis2.configuration_ovis2 import Ovis2Config, Ovis2VisionConfig

    return Ovis2Config(
        vision_config=vision(Ovis2VisionConfig, vocab_size=40, hidden_stride=1),
        text_config=text(tr.Qwen2Config),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[VISION_START, VISION_END, 16, 17, 18],
        hidden_size=32,
        vocab_size=120,
        tie_word_embeddings=False,
    )


def _llama4() -> PreTrainedConfig:
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig, Llama4VisionConfig

    return tr.Llama4Config(
        vision_config=vision(
            Llama4VisionConfig,
            image_size=32,
            pixel_shuffle_ratio=0.5,
            intermediate_size=64,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        text_config=text(
            Llama4TextConfig,
            intermediate_size_mlp=48,
            attention_chunk_size=16,
            num_experts_per_tok=1,
        ),
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _deepseek_vl() -> PreTrainedConfig:
    return tr.DeepseekVLConfig(
        vision_config=siglip(16),
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


class DeepseekHybrid(FixedSize):
    """A second tower sees the same image at a higher resolution."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        tensors = {
            "pixel_values": pixels(1, 3, 16, 16, rng=rng),
            "high_res_pixel_values": pixels(1, 3, 128, 128, rng=rng),
        }
        return Vision([IMAGE] * 16, tensors)


def _deepseek_vl_hybrid() -> PreTrainedConfig:
    return tr.DeepseekVLHybridConfig(
        vision_config=siglip(16),
        high_res_vision_config=vision(
            tr.SamVisionConfig,
            image_size=128,
            patch_size=8,
            window_size=4,
            output_channels=16,
            global_attn_indexes=[1],
            mlp_dim=24,
            num_pos_feats=8,
        ),
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


class Janus(Wrapped):
    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        # Its own generate() passes arguments in a way that the library calls deprecated.
        logging.getLogger("transformers.generation.utils").addFilter(
            lambda record: "guidance_scale" not in record.getMessage()
        )


def _janus() -> PreTrainedConfig:
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    return tr.JanusConfig(
        vision_config=vision(JanusVisionConfig, num_image_tokens=16, mlp_ratio=2.0),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=8,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=4,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        text_config=text(tr.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


SAM: dict[str, Any] = {
    "image_size": 256,
    "patch_size": 16,
    "window_size": 4,
    "output_channels": 16,
    "global_attn_indexes": [1],
    "mlp_dim": 24,
    "num_hidden_layers": 2,
}


class Sam(Wrapped):
    """A SAM tower: 256 pixels, 16 by 16 patches, two strided convolutions: 16 tokens."""

    side = 256


def _got_ocr2() -> PreTrainedConfig:
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig

    return tr.GotOcr2Config(
        vision_config=vision(GotOcr2VisionConfig, **SAM),
        text_config=text(tr.Qwen2Config),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _pp_chart2table() -> PreTrainedConfig:
    from transformers.models.pp_chart2table.configuration_pp_chart2table import (
        PPChart2TableConfig,
        PPChart2TableVisionConfig,
    )

    return PPChart2TableConfig(
        vision_config=vision(PPChart2TableVisionConfig, **SAM),
        text_config=text(tr.Qwen2Config),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


class Blip2(FixedSize):
    """12 learned queries per image, first in the prompt; no row without an image."""

    tokens = 12


class InstructBlip(Blip2):
    """The queries see the instruction, too."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        made = super().image(model, segment, rng)
        made.tensors["qformer_input_ids"] = torch.randint(30, 120, (1, 5), generator=rng)
        made.tensors["qformer_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
        return made


QFORMER: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
}


def _blip2() -> PreTrainedConfig:
    opt = text(tr.OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    return tr.Blip2Config(
        vision_config=vision(tr.Blip2VisionConfig),
        qformer_config=QFORMER,
        text_config=opt,
        num_query_tokens=12,
        image_token_index=IMAGE,
    )


def _instructblip() -> PreTrainedConfig:
    return tr.InstructBlipConfig(
        vision_config=vision(tr.InstructBlipVisionConfig),
        qformer_config=QFORMER,
        text_config=text(tr.LlamaConfig),
        num_query_tokens=12,
        image_token_index=IMAGE,
    )


class Aria(FixedSize):
    side = 24

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        tensors = {
            "pixel_values": pixels(1, 3, self.side, self.side, rng=rng),
            "pixel_mask": torch.ones(1, self.side, self.side, dtype=torch.bool),
        }
        return Vision([IMAGE] * 12, tensors)


def _aria() -> PreTrainedConfig:
    from transformers.models.aria.configuration_aria import AriaTextConfig

    return tr.AriaConfig(
        vision_config=vision(tr.Idefics3VisionConfig, image_size=24, model_type="idefics3_vision"),
        text_config=text(AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={36: 12},
        tie_word_embeddings=False,
    )


class Vq(Wrapped):
    """Images become discrete codes, and their embeddings those of text tokens."""


CODES = 8


def _chameleon() -> PreTrainedConfig:
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

    names = {f"IMGIMG{chr(ord('A') + i)}Z": 20 + i for i in range(CODES)}
    return text(
        tr.ChameleonConfig,
        vq_config=ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=8,
            resolution=16,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
        ),
        vocabulary_map={"<image>": IMAGE, **names},
    )


class Emu3(Wrapped):
    """A row of codes ends with an end-of-line code, which counts as visual, too."""

    side = 16

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        tensors = {
            "pixel_values": pixels(1, 3, self.side, self.side, rng=rng),
            "image_sizes": torch.tensor([[self.side, self.side]]),
        }
        ids = [VISION_START, *[IMAGE] * (4 * 5), VISION_END]
        return Vision(ids, tensors)


def _emu3() -> PreTrainedConfig:
    from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

    names = {f"<|visual token {i:06d}|>": 20 + i for i in range(CODES)}
    return tr.Emu3Config(
        vq_config=Emu3VQVAEConfig(
            codebook_size=CODES,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            hidden_size=32,
        ),
        text_config=text(Emu3TextConfig),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": BREAK, **names},
    )


class Fuyu(FixedSize):
    """No tower: flat patches, projected. Row breaks are text."""

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = 3, 4
        ids = [i for _ in range(h) for i in (*[IMAGE] * w, BREAK)]
        key = "pixel_values" if accepts(model, "pixel_values") else "image_patches"
        return Vision(ids, {key: pixels(1, h * w, 3 * 4 * 4, rng=rng)})

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        made = super().collate(per_row)  # one flat sequence of patches
        return {key: value.flatten(0, 1)[None] for key, value in made.items()}


def _fuyu() -> PreTrainedConfig:
    return tr.FuyuConfig(
        text_config=text(tr.PersimmonConfig, num_key_value_heads=4),
        hidden_size=32,
        patch_size=4,
        image_size=16,
        image_token_id=IMAGE,
    )


def _qianfan() -> PreTrainedConfig:
    from transformers.models.qianfan_ocr.configuration_qianfan_ocr import QianfanOCRVisionConfig

    return tr.QianfanOCRConfig(
        vision_config=vision(QianfanOCRVisionConfig, image_size=32),
        text_config=text(tr.Qwen3Config),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


FAMILIES = [
    Wrapped("ovis2", _ovis2),
    Big("llama4", _llama4),
    FixedSize("deepseek_vl", _deepseek_vl),
    DeepseekHybrid("deepseek_vl_hybrid", _deepseek_vl_hybrid),
    Janus("janus", _janus),
    Sam("got_ocr2", _got_ocr2),
    Sam("pp_chart2table", _pp_chart2table),
    Blip2("blip_2", _blip2, multi_image=False, text_rows=False, model_type="blip-2"),
    InstructBlip("instructblip", _instructblip, multi_image=False, text_rows=False),
    Aria("aria", _aria),
    Vq("chameleon", _chameleon),
    Emu3("emu3", _emu3),
    Fuyu("fuyu", _fuyu),
    Big("qianfan_ocr", _qianfan),
]
