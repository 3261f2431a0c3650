"""Pixtral towers: images of any size, a row break after each row of image tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MistralConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig

from .base import BREAK, IMAGE, PATCH, VISION_END, Family, I, Vision, pixels, text, vision


class Pixtral(Family):
    """I(h, w) in tokens. All images of a batch are padded to the largest, ``image_sizes`` tells."""

    merge = 2

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        h, w = segment.height or 3, segment.width or 4
        ids: list[int] = []
        for row in range(h):
            ids += [*[IMAGE] * w, BREAK if row < h - 1 else VISION_END]
        size = (h * self.merge * PATCH, w * self.merge * PATCH)
        tensors = {
            "pixel_values": pixels(1, 3, *size, rng=rng),
            "image_sizes": torch.tensor([size]),
        }
        return Vision(ids, tensors)

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        images = [image for row in per_row for image in row]
        sizes = [image.tensors["image_sizes"][0] for image in images]
        for image in images:
            made = image.tensors["pixel_values"]
            h, w = torch.stack(sizes).amax(0).tolist()
            image.tensors["pixel_values"] = torch.nn.functional.pad(
                made, (0, w - made.shape[3], 0, h - made.shape[2])
            )
        return super().collate(per_row)


class PixtralLlava(Pixtral):
    """Pixtral-12B in its LLaVA form: no patch merger."""

    merge = 1


def tower() -> PreTrainedConfig:
    return vision(PixtralVisionConfig, image_size=64)


def _mistral3() -> PreTrainedConfig:
    return Mistral3Config(
        vision_config=tower(),
        text_config=text(MistralConfig, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _mistral3_window() -> PreTrainedConfig:
    config = _mistral3()
    config.text_config.sliding_window = 16
    return config


def _pixtral() -> PreTrainedConfig:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=tower(),
        text_config=text(MistralConfig, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


FAMILIES = [
    Pixtral("mistral3", _mistral3, dynamic_size=True),
    Pixtral("mistral3_window", _mistral3_window, dynamic_size=True, model_type="mistral3"),
    PixtralLlava("pixtral", _pixtral, dynamic_size=True),
]
