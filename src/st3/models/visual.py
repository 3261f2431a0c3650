"""Which tokens of a prompt are visual."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st3.hf.call import cache_in
from st3.hf.hooks import Hooks
from st3.models import encoder

_IMAGE_ARGUMENTS = ("pixel_values", "image_hidden_states", "mm_encoder_outputs", "image_embeds")


@dataclass(frozen=True)
class Encoded:
    """One call of a model's encoder of images or videos.

    Attributes:
        video: whether of videos.
        inputs: its arguments by name; pixels without their numbers, on the meta device.
        tokens: visual tokens that it gave.
    """

    video: bool
    inputs: dict[str, Any]
    tokens: int


class _Encoding(threading.local):
    """What a thread has encoded for its next prompt: generate() encodes images before the forward
    call that holds other threads up."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.calls: list[Encoded] = []


class VisualTokens:
    """Listens to a model for which tokens of the chunk under way are visual.

    Most families ask their own ``get_placeholder_mask`` where image features go, which also answers
    for ``inputs_embeds``; where none asks, the config's image token id is looked for.

    Attributes:
        encoded: the encoder's calls for the prompt whose sizes were taken last. generate() encodes
            a prompt's images before its first forward call, which shows no pixels.
    """

    def __init__(self, model: Any, inner: Any) -> None:
        self.model = model
        self.inner = inner
        self._mask: Tensor | None = None
        self._chunk: tuple[Tensor | None, Tensor | None] = (None, None)
        self.encoded: tuple[Encoded, ...] = ()
        self._encoding = _Encoding()
        self.has_image = False
        self.unknown = False

    @property
    def mask(self) -> Tensor | None:
        """[B, T] bool, the visual tokens of the chunk under way; None if none were found."""
        if self._mask is None and self.has_image:
            self._mask = self._placeholders(*self._chunk)
        return self._mask

    def _placeholders(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
        token = getattr(self.model.config, "image_token_id", None)
        if token is None:
            return None
        if ids is not None:
            return ids == token
        if embeds is None:
            return None
        row = self.model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        return (embeds == row).all(-1)

    def listen(self, hooks: Hooks) -> None:
        """Listen on this instance alone; the class stays as it is."""
        encoder.listen(hooks, self.inner, self._note)
        if not hasattr(self.inner, "get_placeholder_mask"):
            return
        original: Callable[..., Any] = self.inner.get_placeholder_mask
        signature = inspect.signature(original)

        def get_placeholder_mask(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.heard(result, signature.bind(*args, **kwargs).arguments)
            return result

        hooks.replace(self.inner, "get_placeholder_mask", get_placeholder_mask)

    def heard(self, result: Any, asked: dict[str, Any]) -> None:
        """Note what the model's ``get_placeholder_mask`` said. Changes what :meth:`mask` gives.

        Args:
            result: a mask, or several: of images, videos and, last, of sounds, which are no visual
                tokens.
            asked: the arguments of the call.
        """
        masks = result if isinstance(result, tuple) else (result,)
        if len(masks) > 1 and hasattr(self.inner, "get_audio_features"):
            masks = masks[:-1]
        for mask in masks:
            self._add(mask)

    def end(self) -> None:
        """Forget what was heard."""
        self._mask, self._chunk = None, (None, None)
        self.has_image = self.unknown = False
        self.encoded = ()
        self._encoding.sizes.clear()
        self._encoding.calls.clear()

    def _note(self, video: bool, inputs: dict[str, Any], result: Any) -> None:
        mine = self._encoding
        features = getattr(result, "pooler_output", result)
        if isinstance(features, (list, tuple)) and features is not result:
            mine.sizes += map(_tokens, features)
        inputs = {name: _without_pixels(name, value) for name, value in inputs.items()}
        mine.calls.append(Encoded(video, inputs, tokens_of(result)))

    def take_sizes(self) -> list[int]:
        """The sizes that this thread has noted so far, and :attr:`encoded` along with them; the
        next prompt starts with none."""
        mine = self._encoding
        sizes, mine.sizes = mine.sizes, []
        self.encoded, mine.calls = tuple(mine.calls), []
        return sizes

    def begin(self, kwargs: dict[str, Any]) -> None:
        """A forward pass starts, with these arguments of the model inside."""
        self._mask = None
        self._chunk = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        # Encoded features come as a tensor or as a dict that may be empty.
        given = (value for name, value in kwargs.items() if name.startswith(_IMAGE_ARGUMENTS))
        self.has_image = any(v is not None and (isinstance(v, Tensor) or bool(v)) for v in given)
        if any(v is not None for name, v in kwargs.items() if name.startswith("pixel_values")):
            # Pixels are encoded within this pass: what was encoded before is another prompt's.
            self._encoding.sizes.clear()
            self._encoding.calls.clear()
        past = cache_in(kwargs)
        self.unknown = (
            not self.has_image
            and kwargs.get("input_ids") is None
            and (past is None or past.get_seq_length() == 0)
        )

    def _add(self, mask: Tensor | None) -> None:
        """``mask`` is [B, T], [B, T, 1] or [B, T, D]."""
        if mask is None:
            return
        flat = mask[..., 0] if mask.dim() == 3 else mask
        self._mask = flat if self._mask is None else self._mask | flat


def check_visual_mask(mask: Any) -> Tensor | None:
    """A caller's mask, or None.

    Raises:
        TypeError: unless it is a bool tensor [batch, tokens].
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
        given = type(mask).__name__
        if isinstance(mask, Tensor):
            given = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise TypeError(f"visual_mask is {given}: pass a bool tensor [batch, tokens]")
    return mask


def tokens_of(encoded: Any) -> int:
    """The visual tokens of an encoder's result."""
    features = getattr(encoded, "pooler_output", encoded)
    return sum(map(_tokens, features if isinstance(features, (list, tuple)) else [features]))


def at_visual(flat: Tensor, visual: Tensor) -> Tensor | None:
    """Numbers of visual tokens at the places of these tokens.

    Args:
        flat: of all visual tokens of a batch, [n, tokens].
        visual: where they are, [B, T] bool.

    Returns:
        [n, B, T], 0 elsewhere; None where the two do not fit.
    """
    # Beams and return sequences: generate() encodes an image once and repeats its row.
    found, total, rows = flat.shape[1], int(visual.sum()), visual.shape[0]
    copies = total // max(1, found)
    if not found or copies * found != total or rows % copies:
        return None
    full = torch.zeros(len(flat), rows // copies, visual.shape[1], device=visual.device)
    full[:, visual[::copies]] = flat.to(visual.device)
    return full.repeat_interleave(copies, dim=1)


def _tokens(features: Any) -> int:
    """Of features [..., D]."""
    return features.numel() // features.shape[-1] if isinstance(features, Tensor) else 0


def _without_pixels(name: str, value: Any) -> Any:
    if name.startswith("pixel_values") and isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    return value


def visual_mask_for(mask: Tensor, embeds: Tensor) -> Tensor:
    """The caller's visual_mask for a batch of prompts: generate() repeats each row for beams and
    return sequences.

    Args:
        mask: [B, T] bool.
        embeds: [B * copies, T, D] of the batch.
    """
    rows, tokens = embeds.shape[:2]
    if mask.shape[1] != tokens or rows % mask.shape[0]:
        raise ValueError(
            f"visual_mask is {tuple(mask.shape)}, the prompt [batch, tokens] = {(rows, tokens)}: "
            "pass the mask of this prompt"
        )
    return mask.to(embeds.device).repeat_interleave(rows // mask.shape[0], dim=0)
