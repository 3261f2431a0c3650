"""What the vision tower's class token attends to, per visual token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from st3.errors import UnsupportedModelError
from st3.hf.hooks import Hooks

REMEDY = "rank by a score that needs none, such as score=divprune or score=attention"


class _Heard(threading.local):
    """What the tower gave in a thread: images are encoded outside of the forward call that holds
    other threads up."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.packed: list[Tensor] = []


class ClassAttentionTap:
    """Listens to a model's vision tower, in the layer whose output becomes the visual tokens.

    The weights are computed anew for the class token's row alone, from the layer's own projections,
    so that the tower runs with whatever attention kernel it has.

    Args:
        config: of the model.
        inner: the model inside, which holds the tower.

    Raises:
        UnsupportedModelError: where the class token itself becomes a visual token.
    """

    def __init__(self, config: Any, inner: Any) -> None:
        self.inner = inner
        if getattr(config, "vision_feature_select_strategy", "default") != "default":
            raise UnsupportedModelError(
                "this model takes the class token itself for a visual token: " + REMEDY
            )
        chosen = getattr(config, "vision_feature_layer", None)
        if chosen is None:  # ViP-LLaVA on transformers 5.17
            chosen = config.vision_feature_layers
        self.attention = _attention_of(inner.vision_tower, chosen)
        self._heard = _Heard()

    def listen(self, hooks: Hooks) -> None:
        """Listen on this instance alone."""
        hooks.before(self.attention, self._hear)
        if hasattr(self.inner, "pack_image_features"):
            pack = self._packing(self.inner.pack_image_features)
            hooks.replace(self.inner, "pack_image_features", pack)

    def take(self, visual: Tensor) -> Tensor:
        """The weights, [B, T], at the visual tokens [B, T] bool of the prompt under way."""
        weights, packed = self._heard.weights, self._heard.packed
        self.end()
        flat = torch.cat(
            [self._tokens(w).flatten() for w in packed or weights] or [visual.new_zeros(0)]
        )
        # Beams and return sequences: generate() encodes an image once and repeats its row.
        total, rows = int(visual.sum()), visual.shape[0]
        copies = total // max(1, len(flat))
        if not len(flat) or copies * len(flat) != total or rows % copies:
            raise UnsupportedModelError(
                f"the vision tower gave {len(flat)} weights for {total} visual tokens (videos, or "
                f"ready-made image features): {REMEDY}"
            )
        full = torch.zeros(rows // copies, visual.shape[1], device=visual.device)
        full[visual[::copies]] = flat.to(visual.device)
        return full.repeat_interleave(copies, dim=0)

    def end(self) -> None:
        """Forget what this thread has heard."""
        self._heard.weights, self._heard.packed = [], []

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad():
            self._heard.weights.append(_class_row(module, hidden))

    def _tokens(self, weights: Tensor) -> Tensor:
        """From patches [images, patches] to visual tokens, where a family joins some."""
        if not hasattr(self.inner, "pixel_shuffle"):
            return weights
        side = round(weights.shape[1] ** 0.5)
        grid = weights.view(-1, side, side, 1)
        ratio = self.inner.config.downsample_ratio
        return self.inner.pixel_shuffle(grid, scale_factor=ratio).mean(-1)

    def _packing(self, pack: Callable[..., Any]) -> Callable[..., Any]:
        """Send the weights the way of the features: tiles put together, padding cut off, newline
        tokens (which get no weight) in between."""

        def packing(image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
            heard = self._heard
            weights, heard.weights = torch.cat(heard.weights)[..., None], []
            tiles = [feature.shape[0] for feature in image_features]
            if sum(tiles) == len(weights):
                newline = {**kwargs, "image_newline": weights.new_zeros(1)}
                heard.packed += pack(torch.split(weights, tiles), image_sizes, *args, **newline)[0]
            return pack(image_features, image_sizes, *args, **kwargs)

        return packing


def _attention_of(tower: nn.Module, feature_layer: Any) -> nn.Module:
    """The attention module of the tower's layer whose output ``feature_layer`` names."""
    stacks = [
        module
        for module in tower.modules()
        if isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "mlp")
    ]
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"{type(tower).__name__} has no single stack of layers: {REMEDY}"
        )
    chosen = feature_layer[-1] if isinstance(feature_layer, (list, tuple)) else feature_layer
    index = len(stacks[0]) + chosen if chosen < 0 else chosen - 1  # 0 would be the embeddings
    layer = stacks[0][max(0, index)]
    attention: nn.Module = getattr(layer, "self_attn", None) or layer.attention
    return attention


def _class_row(module: Any, hidden: Tensor) -> Tensor:
    """Attention of token 0 over the others, mean over heads: [images, patches]."""
    query, key = module.q_proj(hidden[:, :1]), module.k_proj(hidden)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    images, tokens, _ = key.shape
    query = query.view(images, 1, module.num_heads, -1).transpose(1, 2)
    key = key.view(images, tokens, module.num_heads, -1).transpose(1, 2)
    logits = torch.matmul(key, query.transpose(-1, -2))[..., 0].float() * module.scale
    return logits.softmax(dim=-1).mean(dim=1)[:, 1:]
