"""FLOPs of the vision tower and its projector: what trimming inside the decoder cannot change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
        vision = getattr(config, "vision_config", None)
        if vision is None:
            raise ValueError(f"{config.model_type} has no vision_config: it has no vision tower")
        make = _TOWERS.get(vision.model_type)
        if make is None or config.model_type not in _PROJECTORS:
            raise ValueError(
                f"no cost model for the vision tower {vision.model_type!r} of "
                f"{config.model_type!r}; known towers: {', '.join(sorted(_TOWERS))}; known "
                f"models: {', '.join(sorted(_PROJECTORS))}"
            )
        return _PROJECTORS[config.model_type](make(vision), config)


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


# -- towers ---------------------------------------------------------------------------------


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _vit(
    vision: Any,
    *,
    matrices: int = 2,
    class_tokens: int = 0,
    any_size: bool = False,
    pooling_head: bool = False,
) -> VisionDims:
    """CLIP, SigLIP and their like: square crops, an MLP of ``matrices`` matrices."""
    (height, width), (p, q) = _pair(vision.image_size), _pair(vision.patch_size)
    hidden, inner = vision.hidden_size, vision.intermediate_size
    return VisionDims(
        patch=vision.num_channels * p * q,
        hidden=hidden,
        layers=vision.num_hidden_layers,
        mlp=matrices * hidden * inner,
        heads_dim=hidden,
        crop_patches=None if any_size else (height // p) * (width // q),
        patches_per_token=Fraction(1),
        class_tokens=class_tokens,
        pooling_head=2 * hidden * inner if pooling_head else 0,
    )


def _qwen(vision: Any) -> VisionDims:
    """Qwen-VL: native resolution, 2 x 2 patches merged into a token, frames in pairs."""
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    p, q = _pair(vision.patch_size)
    merge = vision.spatial_merge_size**2
    out = getattr(vision, "out_hidden_size", None) or vision.hidden_size
    windows, full, mergers = None, 0, 1
    if vision.model_type == "qwen2_vl_vision":
        mlp = 2 * hidden * int(hidden * vision.mlp_ratio)
    elif vision.model_type == "qwen2_5_vl_vision":
        mlp = 3 * hidden * vision.intermediate_size
        windows = (vision.window_size // p) ** 2
        full = len(vision.fullatt_block_indexes)
    else:  # Qwen3-VL: a further merger for each layer of the decoder that is fed (DeepStack)
        mlp = 2 * hidden * vision.intermediate_size
        mergers += len(vision.deepstack_visual_indexes)
    return VisionDims(
        patch=vision.in_channels * vision.temporal_patch_size * p * q,
        hidden=hidden,
        layers=vision.depth,
        mlp=mlp,
        heads_dim=hidden,
        crop_patches=None,
        patches_per_token=Fraction(merge),
        window=windows,
        full_layers=full,
        projector=mergers * merge * hidden * (merge * hidden + out),
    )


_TOWERS: dict[str, Callable[[Any], VisionDims]] = {
    "clip_vision_model": lambda v: _vit(v, class_tokens=1),
    "siglip_vision_model": lambda v: _vit(v, pooling_head=getattr(v, "vision_use_head", True)),
    "idefics3_vision": _vit,
    "smolvlm_vision": _vit,
    "internvl_vision": lambda v: _vit(v, class_tokens=1),
    "pixtral": lambda v: _vit(v, matrices=3, any_size=True),
    "qwen2_vl_vision": _qwen,
    "qwen2_5_vl_vision": _qwen,
    "qwen3_vl_vision": _qwen,
    "qwen3_vl_moe_vision": _qwen,
}


# -- projectors -----------------------------------------------------------------------------


def _own(tower: VisionDims, config: Any) -> VisionDims:
    """The tower holds its projector."""
    return tower


def _two_linear(tower: VisionDims, config: Any) -> VisionDims:
    """LLaVA: two layers, on every patch; the class token takes part if it is kept."""
    out = config.text_config.hidden_size
    layers = config.vision_feature_layer
    inputs = tower.hidden * (1 if isinstance(layers, int) else len(layers))
    kept = tower.class_tokens if _keeps_class_token(config) else 0
    patches = tower.crop_patches or 1
    return replace(
        tower,
        projector=inputs * out + out * out,
        patches_per_token=Fraction(patches, patches + kept),
    )


def _keeps_class_token(config: Any) -> bool:
    return getattr(config, "vision_feature_select_strategy", "default") == "full"


def _merged(tower: VisionDims, config: Any) -> VisionDims:
    """Mistral 3: patches are merged by one matrix, then LLaVA's two layers."""
    merge = config.spatial_merge_size**2
    projected = _two_linear(tower, config)
    return replace(
        projected,
        projector=projected.projector + merge * tower.hidden**2,
        patches_per_token=Fraction(merge),
    )


def _shuffled(tower: VisionDims, config: Any) -> VisionDims:
    """Idefics3, SmolVLM: patches side by side (pixel shuffle), then one matrix."""
    merge = config.scale_factor**2
    out = config.text_config.hidden_size
    return replace(tower, projector=merge * tower.hidden * out, patches_per_token=Fraction(merge))


def _internvl(tower: VisionDims, config: Any) -> VisionDims:
    merge = int(1 / config.downsample_ratio) ** 2
    out = config.text_config.hidden_size
    return replace(
        tower,
        projector=merge * tower.hidden * out + out * out,
        patches_per_token=Fraction(merge),
    )


def _one_linear(tower: VisionDims, config: Any) -> VisionDims:
    """PaliGemma."""
    return replace(tower, projector=tower.hidden * config.text_config.hidden_size)


def _pooled(tower: VisionDims, config: Any) -> VisionDims:
    """Gemma 3: patches are averaged, then one matrix."""
    return replace(
        tower,
        projector=tower.hidden * config.text_config.hidden_size,
        patches_per_token=Fraction(tower.crop_patches or 1, config.mm_tokens_per_image),
    )


_PROJECTORS: dict[str, Callable[[VisionDims, Any], VisionDims]] = {
    "llava": _two_linear,
    "llava_next": _two_linear,
    "llava_next_video": _two_linear,
    "llava_onevision": _two_linear,
    "mistral3": _merged,
    "idefics3": _shuffled,
    "smolvlm": _shuffled,
    "internvl": _internvl,
    "paligemma": _one_linear,
    "gemma3": _pooled,
    "qwen2_vl": _own,
    "qwen2_5_vl": _own,
    "qwen3_vl": _own,
    "qwen3_vl_moe": _own,
}
