"""No vision tower of the usual kind: discrete codes (Chameleon, Emu 3) or bare patches (Fuyu)."""

from __future__ import annotations

import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import (
    BREAK,
    IMAGE,
    VISION_END,
    VISION_START,
    I,
    Vision,
    accepts,
    pixels,
    text,
)
from .fixed import Wrapped
from .llava import FixedSize


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


FAMILIES = [
    Vq("chameleon", _chameleon),
    Emu3("emu3", _emu3),
    Fuyu("fuyu", _fuyu),
]
