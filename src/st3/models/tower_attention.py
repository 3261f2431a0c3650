"""What a model's vision tower attends to, per visual token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from st3.errors import UnsupportedModelError
from st3.hf.attention import TOWER, attention_of, registered
from st3.hf.hooks import Hooks
from st3.methods.scores.looks import Look
from st3.models.visual import at_visual
from st3.models.ways import Grid, Way

REMEDY = "rank by a score that needs none, such as score=divprune or score=attention"
_NUMBERS = 1 << 24  # of logits that are held at a time


class _Heard(threading.local):
    """What the tower gave in a thread: images are encoded outside of the forward call that holds
    other threads up."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls: dict[int, list[Tensor]] = {}  # by look, of each attention call
        self.packed: list[Tensor] = []
        self.grids: list[Grid] = []


class TowerTap:
    """Listens to a model's vision tower, in the layers that a score looks at.

    The weights are computed from the queries and keys that the layers' attention is given, in
    blocks of rows, so that the tower runs with whatever attention kernel it has.

    Args:
        config: of the model.
        inner: the model inside, which holds the tower.
        looks: what is wanted, and of which layer.
        way: from patches to visual tokens.
        has_class_token: whether the tower has a token of its own in front of its patches.

    Attributes:
        may_lack: whether the score has another way where the tower gives nothing.

    Raises:
        UnsupportedModelError: where the class token itself becomes a visual token, or the tower's
            layers or its attention kernel are unknown.
    """

    def __init__(
        self, config: Any, inner: Any, looks: Sequence[Look], way: Way, has_class_token: bool
    ) -> None:
        self.inner, self.looks, self.way = inner, tuple(looks), way
        self.has_class_token, self.may_lack = has_class_token, False
        strategy = getattr(config, "vision_feature_select_strategy", None)
        if has_class_token and strategy not in (None, "default"):
            raise UnsupportedModelError(
                "this model takes the class token itself for a visual token: " + REMEDY
            )
        self.leaves_first = has_class_token or strategy == "default"
        self.tower = _tower_of(inner)
        modules = _attention_modules(self.tower)
        feature = _feature_layer(config, len(modules))
        self._looked: dict[nn.Module, list[int]] = {}
        for number, look in enumerate(self.looks):
            index = feature if look.depth is None else round(look.depth * len(modules)) - 1
            self._looked.setdefault(modules[max(0, index)], []).append(number)
        self._names = {
            id(config): (config, registered(attention_of(config)))
            for config in map(_config_of, self._looked)
        }
        self._heard = _Heard()

    def listen(self, hooks: Hooks) -> None:
        """Listen on this instance alone."""
        hooks.before(self.tower, self._begin)
        for module, numbers in self._looked.items():
            hooks.replace(module, TOWER, partial(self._hear, numbers))
        for config, name in self._names.values():
            hooks.assign(config, "_attn_implementation", name)
        if self.way.packs and hasattr(self.inner, "pack_image_features"):
            pack = self._packing(self.inner.pack_image_features)
            hooks.replace(self.inner, "pack_image_features", pack)

    def take(self, visual: Tensor) -> Tensor | None:
        """The weights, [looks, B, T], at the visual tokens [B, T] bool of the prompt under way;
        None where the tower gave none for them and the score has another way."""
        packed = self._heard.packed
        flat = torch.cat(packed).T if packed else self._tokens()
        self.end()
        found = at_visual(flat, visual)
        if found is None and not self.may_lack:
            raise UnsupportedModelError(
                f"the vision tower gave {flat.shape[1]} weights for {int(visual.sum())} visual "
                f"tokens (videos, or ready-made image features): {REMEDY}"
            )
        return found

    def end(self) -> None:
        """Forget what this thread has heard."""
        self._heard.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The tower is about to run; what an earlier run left is of no prompt any more."""
        self._heard.clear()
        grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        if isinstance(grids, Tensor) and grids.dim() == 2 and grids.shape[1] == 3:
            self._heard.grids = [(t, h, w) for t, h, w in grids.tolist()]

    @torch.no_grad()
    def _hear(
        self, numbers: Sequence[int], query: Tensor, key: Tensor, mask: Any, given: dict[str, Any]
    ) -> None:
        scaling = given.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        for number in numbers:
            of_class = self.looks[number].of == "class" and self.has_class_token
            rows = query[:, :, :1] if of_class else query
            seen = mask[..., :1, :] if of_class and isinstance(mask, Tensor) else mask
            weights = _received(rows, key, scaling, seen, _ends(given, rows.shape[2]))
            self._heard.calls.setdefault(number, []).append(weights)

    def _tokens(self) -> Tensor:
        """[looks, tokens] of what was heard; no tokens where nothing was."""
        calls = self._heard.calls
        if len(calls) < len(self.looks):
            return torch.zeros(len(self.looks), 0)
        patches = torch.stack([_joined(calls[number]) for number in range(len(self.looks))])
        patches = patches[:, :, 1:] if self.leaves_first else patches
        return self.way.tokens(self.inner, patches, self._heard.grids).flatten(1)

    def _packing(self, pack: Callable[..., Any]) -> Callable[..., Any]:
        """Send the weights the way of the features: tiles put together, padding cut off, newline
        tokens (which get no weight) in between."""

        def packing(image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
            heard, looks = self._heard, len(self.looks)
            weights = self._tokens().view(looks, -1, image_features[0].shape[1]).movedim(0, -1)
            tiles = [feature.shape[0] for feature in image_features]
            if sum(tiles) == len(weights):
                newline = {**kwargs, "image_newline": weights.new_zeros(looks)}
                split = torch.split(weights, tiles)
                heard.packed += pack(split, image_sizes, *args, **newline)[0]
            return pack(image_features, image_sizes, *args, **kwargs)

        return packing


def _tower_of(inner: Any) -> nn.Module:
    for name in ("vision_tower", "visual", "vision_model"):
        tower = getattr(inner, name, None)
        if isinstance(tower, nn.Module):
            return tower
    raise UnsupportedModelError(f"{type(inner).__name__} has no vision tower: {REMEDY}")


def _attention_modules(tower: nn.Module) -> list[nn.Module]:
    """The attention modules of the tower's layers."""
    stacks = []
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            found = [_attention_in(layer) for layer in module]
            if all(one is not None for one in found):
                stacks.append([one for one in found if one is not None])
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"{type(tower).__name__} has no single stack of layers: {REMEDY}"
        )
    return stacks[0]


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no config: {REMEDY}")
    return config


def _attention_in(layer: nn.Module) -> nn.Module | None:
    for name in ("self_attn", "attention", "attn"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def _feature_layer(config: Any, count: int) -> int:
    """Index of the layer whose output becomes the visual tokens."""
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is None:  # ViP-LLaVA on transformers 5.17
        chosen = getattr(config, "vision_feature_layers", None)
    if isinstance(chosen, (list, tuple)):
        chosen = chosen[-1]
    if chosen is None:
        return count - 1
    return max(0, count + chosen if chosen < 0 else chosen - 1)  # 0 would be the embeddings


def _joined(calls: Sequence[Tensor]) -> Tensor:
    """[images, patches] of the calls of a layer's attention; of images of different sizes, which
    are one row cut into parts, [1, patches]."""
    return torch.cat(list(calls), dim=1 if calls[0].shape[0] == 1 else 0)


def _ends(given: dict[str, Any], length: int) -> list[int]:
    """Where the parts of a row end that see nothing of each other (flash attention)."""
    ends = given.get("cu_seq_lens_q")
    return [length] if ends is None or length == 1 else [int(end) for end in ends.tolist()[1:]]


def _received(query: Tensor, key: Tensor, scaling: float, mask: Any, ends: Sequence[int]) -> Tensor:
    """Attention that each key [B, heads, K, size] receives, mean over the heads and over the
    queries [B, heads, Q, size] that see it: [B, K], fp32.

    Args:
        mask: [B or 1, 1 or heads, Q or 1, K], bool or added to the logits; None where all is seen.
        ends: where parts that see nothing of each other end.
    """
    if len(ends) > 1:
        starts = [0, *ends[:-1]]
        parts = [
            _received(query[:, :, a:b], key[:, :, a:b], scaling, None, [b - a])
            for a, b in zip(starts, ends, strict=True)
        ]
        return torch.cat(parts, dim=1)
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    batch, rows, columns = query.shape[0], query.shape[2], key.shape[2]
    total = torch.zeros(batch, columns, device=query.device)
    seen = torch.zeros_like(total)
    step = max(1, _NUMBERS // max(1, batch * heads * columns))
    for start in range(0, rows, step):
        logits = torch.matmul(query[:, :, start : start + step], key.transpose(-1, -2))
        logits = logits.float() * scaling
        shown = _shown(mask, slice(start, start + step), logits)
        weights = logits.masked_fill(~shown, float("-inf")).softmax(-1).nan_to_num(0.0)
        total += weights.mean(1).sum(1)
        seen += shown.expand(batch, -1, logits.shape[2], -1)[:, 0].sum(1)
    return total / seen.clamp_min(1)


def _shown(mask: Any, rows: slice, logits: Tensor) -> Tensor:
    """Which columns the ``rows`` see, [B or 1, 1 or heads, rows, K] bool."""
    if not isinstance(mask, Tensor):
        return torch.ones(1, 1, 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
    part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    part = part[..., : logits.shape[-1]]
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
