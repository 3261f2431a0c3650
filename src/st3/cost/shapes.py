"""Named shapes of well-known models: their configs, and a typical prompt for each.

For random weights in benchmarks and for the cost model, where no hub can be reached. A shape has
no weights, no tokenizer and no processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlavaNextConfig, PreTrainedConfig

from .configs import (
    QWEN2_5_3B,
    QWEN2_5_7B,
    VICUNA_7B,
    VICUNA_13B,
    cpu_308m,
    gemma_3_4b,
    internvl3_8b,
    llava,
    qwen2_5_vl,
    qwen3_vl_8b,
    smolvlm_2b,
)


@dataclass(frozen=True)
class Shape:
    """A model's dimensions and a typical prompt for it."""

    name: str
    make: Callable[[], PreTrainedConfig]
    visual_tokens: int
    images: int = 1  # that the visual tokens come from
    text_tokens: int = 64
    note: str = ""  # the image size or crops that give the visual tokens

    @property
    def config(self) -> PreTrainedConfig:
        """A fresh config, so that changing it changes nobody else's."""
        return self.make()


def shape(name: str) -> Shape:
    """The shape of this name. Raises ValueError with all names for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}: use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def load_config(name_or_path: str | Path, **hub: Any) -> PreTrainedConfig:
    """The config of a shape, of a model folder, of a config.json, or of a model id on the hub.

    Args:
        hub: arguments of ``AutoConfig.from_pretrained`` for an id: ``revision``,
            ``local_files_only`` ...

    Raises:
        ValueError: none of them is found.
    """
    name = str(name_or_path)
    if name in SHAPES:
        return SHAPES[name].config
    if not Path(name).exists() and "/" not in name:
        raise ValueError(
            f"{name!r} is neither a named shape nor an existing file or folder; "
            f"named shapes: {', '.join(SHAPES)}"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a config from {name!r}: {error}\nUse a folder with a config.json, or a "
            f"named shape: {', '.join(SHAPES)}"
        ) from error
    return config


# The number that papers give. transformers adds a token to each row of patches: 2,928 for a square
# image of 672 x 672.
_TILES = "5 crops of 576"

SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("llava-1.5-7b", partial(llava, VICUNA_7B), 576, note="336 x 336"),
        Shape("llava-1.5-13b", partial(llava, VICUNA_13B), 576, note="336 x 336"),
        Shape("llava-next-7b", partial(llava, VICUNA_7B, LlavaNextConfig), 2880, note=_TILES),
        Shape("llava-next-13b", partial(llava, VICUNA_13B, LlavaNextConfig), 2880, note=_TILES),
        Shape("qwen2.5-vl-7b", partial(qwen2_5_vl, QWEN2_5_7B), 1296, note="1008 x 1008"),
        Shape(
            "qwen2.5-vl-3b", partial(qwen2_5_vl, QWEN2_5_3B, tied=True), 1296, note="1008 x 1008"
        ),
        Shape("qwen3-vl-8b", qwen3_vl_8b, 1024, note="1024 x 1024"),
        Shape("internvl3-8b", internvl3_8b, 1792, note="7 crops of 256"),
        Shape("gemma-3-4b", gemma_3_4b, 256, note="896 x 896"),
        Shape("smolvlm-2.2b", smolvlm_2b, 1377, note="17 crops of 81"),
        Shape("cpu-308m", cpu_308m, 576, note="336 x 336"),
        Shape("cpu-308m-2880", cpu_308m, 2880, images=5, note="5 images of 576"),
    )
}
