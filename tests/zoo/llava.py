"""The LLaVA group: a plain vision tower, a projector, a LLaMA or Qwen2 decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    AyaVisionConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VipLlavaConfig,
)

from .base import (
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    I,
    V,
    Vision,
    accepts,
    features,
    pixels,
    text,
    vision,
)


def clip(side: int) -> PreTrainedConfig:
    return vision(CLIPVisionConfig, image_size=side, num_hidden_layers=3)


def siglip(side: int) -> PreTrainedConfig:
    return vision(SiglipVisionConfig, image_size=side)


class FixedSize(Family):
    """Images of one size; as many tokens as the model makes of them. Videos likewise."""

    side = 16
    tokens = 0  # per image, where the model's features do not tell
    before: tuple[int, ...] = ()  # ids around the placeholders
    after: tuple[int, ...] = ()

    @torch.no_grad()
    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        pixel_values = pixels(1, 3, self.side, self.side, rng=rng)
        count = self.tokens or features(
            model.model.get_image_features(pixel_values, return_dict=True)
        )
        ids = [*self.before, *[IMAGE] * count, *self.after]
        return Vision(ids, {"pixel_values": pixel_values})

    @torch.no_grad()
    def video(self, model: PreTrainedModel, segment: V, rng: torch.Generator) -> Vision:
        frames = pixels(1, segment.frames, 3, self.side, self.side, rng=rng)
        count = features(model.model.get_video_features(frames, return_dict=True))
        return Vision([VIDEO] * count, {"pixel_values_videos": frames})


class Tiles(FixedSize):
    """I(h, w) in pixels: the whole image, then its tiles with a newline token after each row."""

    side = 8
    default = (16, 16)

    @torch.no_grad()
    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        size = (segment.height or self.default[0], segment.width or self.default[1])
        tiles = 1 + (-(-size[0] // self.side)) * (-(-size[1] // self.side))
        pixel_values = pixels(1, tiles, 3, self.side, self.side, rng=rng)
        sizes = torch.tensor([size])
        made = model.model.get_image_features(pixel_values, sizes, return_dict=True)
        return Vision(
            [IMAGE] * features(made), {"pixel_values": pixel_values, "image_sizes": sizes}
        )

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        images = [v for row in per_row for v in row if "pixel_values" in v.tensors]
        most = max((v.tensors["pixel_values"].shape[1] for v in images), default=0)
        for image in images:  # fewer tiles than others: pad with zeros, as the processor does
            made = image.tensors["pixel_values"]
            padded = made.new_zeros(1, most, *made.shape[2:])
            padded[:, : made.shape[1]] = made
            image.tensors["pixel_values"] = padded
        return super().collate(per_row)


class BigTiles(Tiles):
    """Tiles of 16 pixels, so that the pooled frames of a video have 4 tokens each."""

    side = 16


class OneVision(BigTiles):
    """A newline token ends a video."""

    @torch.no_grad()
    def video(self, model: PreTrainedModel, segment: V, rng: torch.Generator) -> Vision:
        made = super().video(model, segment, rng)
        made.ids += [VIDEO] * (len(made.ids) % segment.frames == 0)  # older: not yet counted
        return made


GRID = [[8, 16], [16, 8], [16, 16]]
BIG_GRID = [[16, 16], [16, 32], [32, 16]]


def _llava() -> LlavaConfig:
    return LlavaConfig(
        vision_config=clip(16), text_config=text(LlamaConfig), image_token_index=IMAGE
    )


def _vipllava() -> VipLlavaConfig:
    return VipLlavaConfig(
        vision_config=clip(16),
        text_config=text(LlamaConfig),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2, 1],
    )


def _llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=clip(8),
        text_config=text(LlamaConfig),
        image_token_index=IMAGE,
        image_grid_pinpoints=GRID,
    )


def _llava_next_video() -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(
        vision_config=clip(16),
        text_config=text(LlamaConfig),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=BIG_GRID,
    )


def _llava_onevision() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=siglip(16),
        text_config=text(Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=BIG_GRID,
    )


def _video_llava() -> VideoLlavaConfig:
    return VideoLlavaConfig(
        vision_config=clip(12),
        text_config=text(LlamaConfig),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def _internvl() -> PreTrainedConfig:
    return InternVLConfig(
        vision_config=vision(InternVLVisionConfig, image_size=32),
        text_config=text(Qwen2Config),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _aya_vision() -> PreTrainedConfig:
    return AyaVisionConfig(
        vision_config=siglip(32),
        text_config=text(Cohere2Config, sliding_window=16),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _cohere2_vision() -> PreTrainedConfig:
    return Cohere2VisionConfig(
        vision_config=siglip(32),
        text_config=text(Cohere2Config, sliding_window=16),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
        tie_word_embeddings=False,
    )


class Shuffled(FixedSize):
    """A pixel shuffle takes 2 by 2 patches together: 16 tokens."""

    side = 32
    before, after = (VISION_START,), (VISION_END,)


class VideoLlava(FixedSize):
    side = 12

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        made = super().image(model, segment, rng)
        if not accepts(model, "pixel_values"):
            made.tensors["pixel_values_images"] = made.tensors.pop("pixel_values")
        return made


FAMILIES = [
    FixedSize("llava", _llava),
    Tiles("llava_next", _llava_next, dynamic_size=True),
    OneVision("llava_onevision", _llava_onevision, supports_video=True, dynamic_size=True),
    BigTiles("llava_next_video", _llava_next_video, supports_video=True, dynamic_size=True),
    FixedSize("vipllava", _vipllava),
    Shuffled("internvl", _internvl),
    Shuffled("aya_vision", _aya_vision),
    Shuffled("cohere2_vision", _cohere2_vision),
    VideoLlava("video_llava", _video_llava, supports_video=True),
]
