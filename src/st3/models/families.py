"""What differs between model families, and which of them can be trimmed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from st3.errors import UnsupportedModelError
from st3.hf.call import cache_in
from st3.hf.hooks import Hooks
from st3.models.rotary import Unrotate, inverse_rotation
from st3.models.tower import ClassAttentionTap


@dataclass(frozen=True)
class Family:
    """One supported family.

    Attributes:
        model_type: ``config.model_type`` of its models.
        name: how people call it.
        notes: what a user should know.
        video: whether videos are trimmed too.
    """

    model_type: str
    name: str
    notes: str = ""
    video: bool = False

    def parts(self, model: nn.Module) -> Parts:
        """The modules that the engine hooks into; see :func:`parts_of`."""
        return parts_of(model)

    def visual_tokens(self, model: nn.Module, parts: Parts) -> VisualTokens:
        """What listens for which tokens of a prompt are visual."""
        return VisualTokens(model, parts.inner)

    def class_attention(self, model: nn.Module, parts: Parts) -> ClassAttentionTap:
        """What listens for the attention of the vision tower's class token.

        Raises:
            UnsupportedModelError: if the family's tower has none.
        """
        return ClassAttentionTap(model, parts.inner)

    def inverse_rotation(self, parts: Parts) -> Unrotate:
        """What takes RoPE off queries and keys.

        Raises:
            UnsupportedModelError: if the family rotates in a way that cannot be undone.
        """
        return inverse_rotation(parts.attentions)


FAMILIES: tuple[Family, ...] = (
    Family("llava", "LLaVA 1.5, Pixtral (transformers layout)"),
    Family("llava_next", "LLaVA-NeXT (1.6)", "tiles and newline tokens are visual tokens"),
    Family("llava_onevision", "LLaVA-OneVision", video=True),
    Family("llava_next_video", "LLaVA-NeXT-Video", video=True),
    Family("qwen2_vl", "Qwen2-VL", "multimodal RoPE", video=True),
    Family("qwen2_5_vl", "Qwen2.5-VL", "multimodal RoPE", video=True),
    Family("qwen3_vl", "Qwen3-VL", "DeepStack", video=True),
    Family("smolvlm", "SmolVLM, SmolVLM2", "tiles stand between marker tokens"),
    Family("idefics3", "Idefics3", "tiles stand between marker tokens"),
    Family("internvl", "InternVL 2.5, 3, 3.5"),
    Family("mistral3", "Mistral 3", "row-break tokens between patches are text"),
    Family("paligemma", "PaliGemma 1, 2", "the whole prompt attends in both directions"),
    Family("gemma3", "Gemma 3", "sliding windows; an image attends in both directions"),
    Family("gemma4", "Gemma 4", "variants that share KV entries between layers are refused"),
    Family("gemma4_unified", "Gemma 4 (unified)"),
    Family("qwen3_vl_moe", "Qwen3-VL MoE", "DeepStack", video=True),
    Family("qwen2_5_omni_thinker", "Qwen2.5-Omni (thinker)", "audio tokens are text"),
    Family("qwen3_omni_moe_thinker", "Qwen3-Omni (thinker)", "audio tokens are text"),
    Family("glm4v", "GLM-4.1V", "multimodal RoPE"),
    Family("glm4v_moe", "GLM-4.5V", "multimodal RoPE"),
    Family("glm46v", "GLM-4.6V", "multimodal RoPE"),
    Family("glm_ocr", "GLM-OCR"),
    Family("ovis2", "Ovis2"),
    Family("molmo2", "Molmo 2"),
    Family("aria", "Aria"),
    Family("aya_vision", "Aya Vision"),
    Family("cohere2_vision", "Command A Vision"),
    Family("cohere_compass", "Cohere Compass"),
    Family("cosmos3_edge", "Cosmos 3 Edge"),
    Family("cosmos3_omni", "Cosmos 3 Omni", "DeepStack"),
    Family("deepseek_ocr2", "DeepSeek-OCR 2"),
    Family("deepseek_vl", "DeepSeek-VL"),
    Family("deepseek_vl_hybrid", "DeepSeek-VL (hybrid)"),
    Family("emu3", "Emu3 (understanding)"),
    Family("ernie4_5_vl_moe", "ERNIE 4.5 VL", "experts by modality"),
    Family("exaone4_5", "EXAONE 4.5"),
    Family("fast_vlm", "FastVLM"),
    Family("fuyu", "Fuyu"),
    Family("got_ocr2", "GOT-OCR 2"),
    Family("granite_docling", "Granite Docling"),
    Family("hunyuan_vl", "Hunyuan-VL"),
    Family("hyperclovax_vision_v2", "HyperCLOVA X Vision"),
    Family("idefics2", "Idefics2", "a perceiver already reduces an image to 64 tokens"),
    Family("janus", "Janus (understanding)"),
    Family("kimi_k25", "Kimi K2.5", "multi-head latent attention"),
    Family("lighton_ocr", "LightOnOCR"),
    Family("muse_glimmer", "Muse Glimmer"),
    Family("muse_spark", "Muse Spark"),
    Family("paddleocr_vl", "PaddleOCR-VL"),
    Family("perception_lm", "Perception LM"),
    Family("qianfan_ocr", "Qianfan-OCR"),
    Family("step3p7", "Step 3.7"),
    Family("video_llama_3", "VideoLLaMA 3"),
    Family("video_llava", "Video-LLaVA"),
    Family("vipllava", "ViP-LLaVA"),
)

_CROSS = "its image goes through cross-attention layers: the text has no visual tokens"
_ENCODER_DECODER = "it is an encoder-decoder: the decoder sees no visual tokens"
_NO_PLACEHOLDER = "its image has no placeholder tokens that say which tokens are visual"
_QUERIES = "a Q-Former already reduces an image to 32 tokens"
_SHARED = "its last layers read KV entries shared with earlier ones, which trimming makes uneven"
_STATE = "its linear attention layers hold a state of all tokens, and no KV entries to trim"
_INDEX = "an index of its own chooses which keys a query sees, by their place in the whole sequence"
REFUSED: dict[str, str] = {
    "mllama": _CROSS,
    "idefics": _CROSS,
    "blip": _CROSS,
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "kosmos-2": _NO_PLACEHOLDER,
    "kosmos-2.5": _NO_PLACEHOLDER,
    "git": _NO_PLACEHOLDER,
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "gemma3n": _SHARED,
    "qwen3_5": _STATE,
    "qwen3_5_moe": _STATE,
    "minicpmv4_6": _STATE,
    "glm5_next": _STATE,
    "lfm2_vl": "its convolution layers hold a state of tokens, and no KV entries to trim",
    "granite4_vision": "it adds image features between late layers (deepstack), in its own loop",
    "mistral_large4": _INDEX,
    "minimax_m3_vl": _INDEX,
    "unlimited_ocr": "its cache layers hold a sliding window over the answer",
    "diffusion_gemma": "it generates by diffusion, not token by token",
}


def family_of(model: nn.Module, untested: bool = False) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: refused or unknown families; an unknown one can be tried with
            ``untested=True`` if it has ``get_placeholder_mask``.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    if model_type in REFUSED:
        raise UnsupportedModelError(f"{model_type} cannot be trimmed: {REFUSED[model_type]}")
    if untested and hasattr(getattr(model, "model", None), "get_placeholder_mask"):
        return Family(str(model_type), str(model_type), "untested")
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UnsupportedModelError(
        f"model type {model_type!r} is not a supported vision-language model. Supported: {known}. "
        "If it passes its visual tokens through get_placeholder_mask, try untested=True"
    )


@dataclass(frozen=True)
class Parts:
    """The modules of a model that the engine hooks into."""

    inner: Any
    text: Any
    layers: tuple[Any, ...]
    attentions: tuple[Any, ...]
    windows: tuple[int | None, ...]


def parts_of(model: nn.Module) -> Parts:
    """Find the text model, its decoder layers and their attention.

    Raises:
        UnsupportedModelError: if the model is laid out otherwise, with the reason.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "this model")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{model_type} is an encoder-decoder and cannot be trimmed")
    inner = getattr(model, "model", None)
    text = getattr(inner, "language_model", None) or getattr(inner, "text_model", None)
    if text is None and hasattr(model, "get_placeholder_mask"):
        inner, text = model, inner  # transformers 5.17: the Omni thinkers are in one piece
    layers = getattr(text, "layers", None)
    if inner is None or text is None or not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no model.language_model.layers: load it with "
            "AutoModelForImageTextToText"
        )
    count = text.config.num_hidden_layers
    attentions = tuple(getattr(layer, "self_attn", None) for layer in layers[:count])
    if any(attention is None or not hasattr(attention, "layer_idx") for attention in attentions):
        raise UnsupportedModelError(
            f"{model_type} mixes in decoder layers without softmax attention (linear attention, "
            "convolution), which hold no KV entries to trim"
        )
    if any(getattr(attention, "is_kv_shared_layer", False) for attention in attentions):
        raise UnsupportedModelError(
            f"this {model_type} has layers with shared KV entries, which trimming makes uneven"
        )
    return Parts(inner, text, tuple(layers[:count]), attentions, _windows(text.config, attentions))


def _windows(config: Any, attentions: tuple[Any, ...]) -> tuple[int | None, ...]:
    """The sliding window of each decoder layer, as its attention module or the config says it."""
    types = getattr(config, "layer_types", None)
    windows: list[int | None] = []
    for index, attention in enumerate(attentions):
        kind = types[index] if types else None
        if kind is None:
            window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        elif kind == "sliding_attention":
            window = getattr(attention, "sliding_window", None) or config.sliding_window
        elif kind == "full_attention":
            window = None
        else:
            raise UnsupportedModelError(f"decoder layers of type {kind!r} are not supported")
        windows.append(window)
    return tuple(windows)


_ENCODERS = ("get_image_features", "get_video_features")
_IMAGE_ARGUMENTS = ("pixel_values", "image_hidden_states", "mm_encoder_outputs", "image_embeds")


class VisualTokens:
    """Listens to a model for which tokens of the chunk under way are visual.

    Most families ask their own ``get_placeholder_mask`` where image features go, which also answers
    for ``inputs_embeds``; where none asks, the config's image token id is looked for.
    """

    def __init__(self, model: Any, inner: Any) -> None:
        self.model = model
        self.inner = inner
        self._mask: Tensor | None = None
        self._chunk: tuple[Tensor | None, Tensor | None] = (None, None)
        self.sizes: list[int] = []
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
        for name in _ENCODERS:
            if hasattr(self.inner, name):
                hooks.replace(self.inner, name, self._counting(getattr(self.inner, name)))
        if not hasattr(self.inner, "get_placeholder_mask"):
            return
        original: Callable[..., Any] = self.inner.get_placeholder_mask

        def get_placeholder_mask(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            for mask in result if isinstance(result, tuple) else (result,):
                self._add(mask)
            return result

        hooks.replace(self.inner, "get_placeholder_mask", get_placeholder_mask)

    def end(self) -> None:
        """Forget what was heard."""
        self._mask, self._chunk = None, (None, None)
        self.sizes.clear()

    def _counting(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)  # generate() reads the signature
        def counting(*args: Any, **kwargs: Any) -> Any:
            result = encode(*args, **kwargs)
            features = getattr(result, "pooler_output", None)
            if isinstance(features, (list, tuple)):
                self.sizes += [len(image) for image in features]
            return result

        return counting

    def take_sizes(self) -> list[int]:
        """The sizes noted so far; the next prompt starts with none."""
        sizes, self.sizes = self.sizes, []
        return sizes

    def begin(self, kwargs: dict[str, Any]) -> None:
        """A forward pass starts, with these arguments of the model inside."""
        self._mask = None
        self._chunk = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        # Encoded features come as a tensor or as a dict that may be empty.
        given = (value for name, value in kwargs.items() if name.startswith(_IMAGE_ARGUMENTS))
        self.has_image = any(v is not None and (isinstance(v, Tensor) or bool(v)) for v in given)
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
