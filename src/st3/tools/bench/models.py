"""What is measured: a named shape with random weights, or a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
)
from transformers.initialization import no_init_weights

from st3.cost.shapes import SHAPES as MODEL_SHAPES
from st3.cost.shapes import Shape
from st3.tools.bench.hybrids import SHAPES as HYBRIDS
from st3.tools.common.load import load_model
from st3.tools.common.memory import available_bytes


def _tiny() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
        ),
        image_token_index=100,
        image_seq_length=16,
    )


def _grouped(layers: int, heads: int, kv_heads: int, head_dim: int) -> LlavaConfig:
    """cpu-308m with grouped queries: ``heads`` query heads, of which ``heads / kv_heads`` share
    each key and value head."""
    config = MODEL_SHAPES["cpu-308m"].config
    text = config.text_config
    text.num_hidden_layers = layers
    text.num_attention_heads, text.num_key_value_heads = heads, kv_heads
    text.head_dim = head_dim
    return config


# Head layouts of current models, most of which have grouped queries: a decode step reads fewer
# keys and values for its weights than one of LLaVA-1.5's, and kernels take other paths.
GROUPED = ("cpu-308m-gqa", "cpu-gqa-32-8", "cpu-gqa-28-4")
SHAPES: dict[str, Shape] = {
    **MODEL_SHAPES,
    "cpu-308m-gqa": Shape(
        "cpu-308m-gqa", partial(_grouped, 24, 16, 4, 64), 576, note="16 query, 4 KV heads of 64"
    ),
    "cpu-gqa-32-8": Shape(
        "cpu-gqa-32-8", partial(_grouped, 12, 32, 8, 128), 576, note="as Qwen3-VL-8B, 12 layers"
    ),
    "cpu-gqa-28-4": Shape(
        "cpu-gqa-28-4", partial(_grouped, 12, 28, 4, 128), 576, note="as InternVL3-8B, 12 layers"
    ),
    **HYBRIDS,
    "tiny": Shape("tiny", _tiny, 16, text_tokens=8, note="to try the commands out"),
}


@dataclass(frozen=True)
class Subject:
    """A model to measure and a typical prompt for it.

    Attributes:
        model: in eval mode, on its device; its generation never stops before the asked length.
        random: whether the weights are random.
    """

    name: str
    model: Any
    visual_tokens: int
    text_tokens: int = 64
    images: int = 1
    random: bool = True

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def vocab(self) -> int:
        vocab: int = self.text_config.vocab_size
        return vocab


def from_shape(
    name: str, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> Subject:
    """A model of a named shape with random weights, made directly on ``device`` in ``dtype``.

    Args:
        name: one of ``SHAPES``.
        device: where it is made.
        dtype: of its weights.
        attention: transformers' ``attn_implementation``.

    Raises:
        ValueError: an unknown shape, or one that does not fit into the free memory.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}: use one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    needed = count_parameters(shape) * torch.empty((), dtype=dtype).element_size()
    free = available_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{name} needs {needed / 2**30:.1f} GiB for its weights in {dtype}, {device} has "
            f"{free / 2**30:.1f} GiB free: use a smaller shape or another device"
        )
    # Weights are drawn below, in one pass: transformers' own initialisation takes minutes.
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            shape.config, dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()
    _draw_weights(model)
    return Subject(name, _endless(model), shape.visual_tokens, shape.text_tokens, shape.images)


def from_folder(
    path: str | Path, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> Subject:
    """A saved model. Its prompts are random tokens like those of a shape: nothing that is timed
    depends on them.

    Args:
        path: a folder with a ``config.json``.
        device, dtype, attention: as for :func:`from_shape`.

    Raises:
        ValueError: no model there, or not an image-text-to-text model.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model in {str(path)!r}: give a folder with a config.json")
    model = load_model(str(folder), device, dtype, attention=attention)
    tokens = getattr(model.config, "image_seq_length", None) or 576
    return Subject(folder.name, _endless(model), tokens, random=False)


def count_parameters(shape: Shape) -> int:
    """Parameters of a shape, tied ones once, counted without memory."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(shape.config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def _endless(model: Any) -> Any:
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
    return model.eval()


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms become the identity, biases 0, everything else normal with standard deviation 0.02."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2 and name.endswith("weight"):
            weight.fill_(1)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            generator = generators.get(weight.device)
            if generator is None:
                generator = torch.Generator(weight.device).manual_seed(seed)
                generators[weight.device] = generator
            weight.normal_(0, 0.02, generator=generator)
