"""Vision towers and projectors as products of matrices, for the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

from st3.cost.vision import VisionDims


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def vit(
    vision: Any,
    *,
    matrices: int = 2,
    class_tokens: int = 0,
    any_size: bool = False,
    pooling_head: bool = False,
) -> VisionDims:
    """CLIP, SigLIP and their like, which take square crops.

    Args:
        vision: the config of the tower.
        matrices: of the MLP: 2, or 3 with a gate.
        class_tokens: before the patches.
        any_size: images of any size, in place of crops of one size.
        pooling_head: attention behind the last layer, which costs and gives no visual tokens.
    """
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


def siglip(vision: Any) -> VisionDims:
    return vit(vision, pooling_head=getattr(vision, "vision_use_head", True))


def qwen(vision: Any) -> VisionDims:
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


# The towers that are described, by their config's model type; families share them.
TOWERS: dict[str, Callable[[Any], VisionDims]] = {
    "clip_vision_model": partial(vit, class_tokens=1),
    "siglip_vision_model": siglip,
    "idefics3_vision": vit,
    "smolvlm_vision": vit,
    "internvl_vision": partial(vit, class_tokens=1),
    "pixtral": partial(vit, matrices=3, any_size=True),
    "qwen2_vl_vision": qwen,
    "qwen2_5_vl_vision": qwen,
    "qwen3_vl_vision": qwen,
    "qwen3_vl_moe_vision": qwen,
}


def tower_of(config: Any) -> VisionDims:
    """The tower of a model's config, without its projector.

    Raises ValueError for a tower whose cost this model does not describe.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError(f"{config.model_type} has no vision_config: it has no vision tower")
    make = TOWERS.get(vision.model_type)
    if make is None:
        raise ValueError(
            f"no cost model for the vision tower {vision.model_type!r} of {config.model_type!r}; "
            f"known towers: {', '.join(sorted(TOWERS))}"
        )
    return make(vision)


def has_class_token(vision: Any) -> bool:
    """Whether a tower, by its config, puts one class token in front of its patches."""
    make = TOWERS.get(getattr(vision, "model_type", ""))
    return make is not None and make(vision).class_tokens == 1


def two_linear(tower: VisionDims, config: Any) -> VisionDims:
    """LLaVA's projector: two layers, on every patch; the class token takes part if it is kept.

    Args:
        tower: without a projector.
        config: of the whole model.
    """
    out = config.text_config.hidden_size
    layers = config.vision_feature_layer
    inputs = tower.hidden * (1 if isinstance(layers, int) else len(layers))
    keeps = getattr(config, "vision_feature_select_strategy", "default") == "full"
    kept = tower.class_tokens if keeps else 0
    patches = tower.crop_patches or 1
    return replace(
        tower,
        projector=inputs * out + out * out,
        patches_per_token=Fraction(patches, patches + kept),
    )


def shuffled(tower: VisionDims, merge: int, out: int, layers: int = 1) -> VisionDims:
    """A projector on patches side by side (pixel shuffle).

    Args:
        tower: without a projector.
        merge: patches that become one token.
        out: width of a token.
        layers: 1 matrix, or 2.
    """
    projector = merge * tower.hidden * out + (layers - 1) * out * out
    return replace(tower, projector=projector, patches_per_token=Fraction(merge))
