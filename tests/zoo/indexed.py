"""Families in which an index chooses the keys that each query sees. All without their towers."""

from __future__ import annotations

import transformers as tr
from transformers import PreTrainedConfig

from .base import IMAGE, VIDEO, text, vision
from .hybrids import Each
from .mistral import tower
from .qwen import rope
from .refused_configs import latent, sub


def _minimax_m3_vl() -> PreTrainedConfig:
    return tr.MiniMaxM3VLConfig(
        vision_config=vision(sub("minimax_m3_vl", "vision_config")),
        text_config=text(
            sub("minimax_m3_vl", "text_config"),
            dense_intermediate_size=48,
            shared_intermediate_size=16,
            rotary_dim=4,
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=3,
            layer_types=["full_attention"] * 2 + ["minimax_m3_sparse"] * 6,
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=16,
    )


def _mistral_large4() -> PreTrainedConfig:
    """Every layer has an index, but for two that go by the one before."""
    kinds = ["full", "full", "full", "shared", "full", "full", "shared", "full"]
    return tr.MistralLarge4Config(
        vision_config=tower(),
        text_config=latent("mistral_large4", qk_rope_head_dim=4, head_dim=4, indexer_types=kinds),
        image_token_index=IMAGE,
    )


def _hy_v4_vl() -> PreTrainedConfig:
    return tr.HYV4VLConfig(
        vision_config=vision(sub("hy_v4_vl", "vision_config")),
        text_config=latent(
            "hy_v4_vl",
            qk_rope_head_dim=8,
            index_head_dim=16,
            hc_mult=2,
            rope_parameters=rope((1, 1, 2)),
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


class MiniMax(Each):
    """transformers 5.16's own forward fails: it asks a tuple of image features for their device."""

    @property
    def available(self) -> bool:
        return super().available and not tr.__version__.startswith("5.16.")


FAMILIES = [
    MiniMax("minimax_m3_vl", _minimax_m3_vl),
    Each("mistral_large4", _mistral_large4),
    Each("hy_v4_vl", _hy_v4_vl, attention="eager"),  # sdpa knows no learned sinks,
]
