"""FLOPs of the vision tower and its projector: what trimming inside the decoder cannot change."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class VisionDims:
    """A vision tower with its projector, as products of matrices.

    A *crop* is what the tower sees at once: an image, or a tile of one.
    """

    patch: int  # numbers in one patch: channels * frames * height * width
    hidden: int
    layers: int
    mlp: int  # weights of one layer's MLP
    heads_dim: int  # heads * head_dim of the attention
    crop_patches: int | None  # patches of a crop; None: any number (native resolution)
    patches_per_token: Fraction  # patches that become one visual token
    class_tokens: int = 0  # extra tokens inside the tower
    window: int | None = None  # patches of an attention window
    full_layers: int = 0  # layers that see the whole crop although others have windows
    pooling_head: int = 0  # MLP weights of SigLIP's attention pooling head, if it is there
    projector: int = 0  # weights of the projector, applied once per visual token

    @classmethod
    def from_config(cls, config: Any) -> VisionDims:
        """Read the dimensions from the config of a vision-language model.

        Raises ValueError for a tower or projector whose cost this model does not describe.
        """
        from st3.models import config_family

        return config_family(config).tower_dims(config)


def vision_flops(dims: VisionDims, n_visual: int, crops: int | None = None) -> int:
    """FLOPs that make ``n_visual`` visual tokens, the projector included.

    ``crops``: how many crops the tower sees. None means as many as give ``n_visual`` tokens
    (tiles whose tokens are partly thrown away later, as LLaVA-NeXT does with padding, need the
    true number), or one where the tower takes any size. Windows are taken to be full.
    """
    if n_visual < 0:
        raise ValueError(f"n_visual cannot be negative, got {n_visual}")
    if n_visual == 0:
        return 0
    patches = round(n_visual * dims.patches_per_token)
    if crops is None:
        crops = 1 if dims.crop_patches is None else max(1, round(patches / dims.crop_patches))
    if crops < 1:
        raise ValueError(f"crops must be at least 1, got {crops}")
    per_crop = dims.crop_patches or patches // crops
    tokens = per_crop + dims.class_tokens
    width = dims.heads_dim
    windowed = 0 if dims.window is None else dims.layers - dims.full_layers
    pairs = (dims.layers - windowed) * tokens**2 + windowed * tokens * min(dims.window or 0, tokens)
    flops = 2 * per_crop * dims.patch * dims.hidden
    flops += 2 * dims.layers * tokens * (4 * dims.hidden * width + dims.mlp) + 4 * width * pairs
    if dims.pooling_head:  # one query over all tokens
        flops += 4 * dims.hidden**2 * (1 + tokens) + 4 * dims.hidden * tokens
        flops += 2 * dims.pooling_head
    outputs = Fraction(per_crop) / dims.patches_per_token
    return crops * (flops + round(2 * outputs * dims.projector))
