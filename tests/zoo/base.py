"""Tiny vision-language models with random weights: what is common to all families.

A family gives a config (``make_config``) and says how one image or video becomes token ids and
tensors (``image``, ``video``); everything else (weights, padding, batches, masks) is here.
Nothing is read from a model hub.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

torch.set_num_threads(1)  # the models are far too small to gain from more

VOCAB = 120
FIRST_TEXT = 30  # ids below are special: never drawn for text, and never generated
PAD, BOS, EOS = 0, 1, 2
# Ids of special tokens, the same in every family that lets us choose them.
IMAGE, VIDEO, VISION_START, VISION_END, BREAK, NEWLINE = 10, 11, 12, 13, 14, 15


@dataclass(frozen=True)
class T:
    """``n`` random text tokens."""

    n: int


@dataclass(frozen=True)
class I:  # noqa: E742
    """One image; the size in the family's own unit (see its ``image``) where it is dynamic."""

    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class V:
    """One short video; all videos of a batch need the same length in some families."""

    frames: int = 4


Segment = T | I | V


class Batch(dict[str, Any]):
    """Model inputs, and where the images are: ``spans[row]`` = one (start, end) per image or
    video, from its first visual token to one past its last."""

    spans: list[list[tuple[int, int]]]


@dataclass
class Vision:
    """What one image or video adds to a prompt: its ids, which count as visual by their value,
    and tensors that are concatenated over all images of the batch, in order."""

    ids: list[int]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Family:
    """One family of models. ``make_config`` returns a fresh config every time."""

    name: str
    make_config: Callable[[], PreTrainedConfig]
    supports_video: bool = False
    multi_image: bool = True
    dynamic_size: bool = False  # I(h, w) gives images of different token counts
    text_rows: bool = True  # rows without an image may stand in a batch with images
    solo: bool = True  # a row of a batch equals the row alone
    attention: str | None = None  # implementation; None: the library's choice
    model_type: str = ""  # as transformers has it, where it differs from the name
    visual_ids: tuple[int, ...] = (IMAGE, VIDEO)
    gain: float = 1.3  # of the random weights; queries and keys get it twice

    @property
    def available(self) -> bool:
        """Whether the installed transformers has this family."""
        return (self.model_type or self.name) in CONFIG_MAPPING_NAMES

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A fresh fp32 model in eval mode; the same weights for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = self.make_config()
            model = AutoModelForImageTextToText.from_config(
                config, dtype=torch.float32, attn_implementation=self.attention
            )
            randomise(model, self.gain)
        self.finish(model)
        generation = model.generation_config
        generation.pad_token_id, generation.bos_token_id = PAD, BOS
        generation.eos_token_id = None  # so that the length of an answer is what is asked for
        return model.eval()

    def finish(self, model: PreTrainedModel) -> None:
        """Last touches to the weights, for families that need them."""
        head = model.get_output_embeddings() or model.language_model.lm_head
        with torch.no_grad():  # special tokens (also image placeholders) are never the argmax
            head.weight[:FIRST_TEXT] = 0
            if getattr(head, "bias", None) is not None:
                head.bias[:FIRST_TEXT] = 0

    # -- inputs ---------------------------------------------------------------------------

    def image(self, model: PreTrainedModel, segment: I, rng: torch.Generator) -> Vision:
        raise NotImplementedError

    def video(self, model: PreTrainedModel, segment: V, rng: torch.Generator) -> Vision:
        raise NotImplementedError(f"{self.name} has no video")

    def extras(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Inputs that follow from ids and mask, such as token types."""
        return {}

    def collate(self, per_row: list[list[Vision]]) -> dict[str, Tensor]:
        """Tensors of all images of the batch; by default concatenated in row-major order."""
        out: dict[str, list[Tensor]] = {}
        for row in per_row:
            for vision in row:
                for key, value in vision.tensors.items():
                    out.setdefault(key, []).append(value)
        return {key: torch.cat(values) for key, values in out.items()}

    def inputs(
        self,
        model: PreTrainedModel,
        rows: Sequence[Sequence[Segment]],
        seed: int = 0,
        padding: str = "left",
        only: int | None = None,
    ) -> Batch:
        """A batch for ``model(**batch)`` and ``model.generate(**batch)``.

        ``only=i`` gives row ``i`` alone, unpadded, with the same ids and pixels as in the batch.
        """
        rng = torch.Generator().manual_seed(seed)
        all_ids: list[list[int]] = []
        all_vision: list[list[Vision]] = []
        for row in rows:
            ids: list[int] = []
            visions: list[Vision] = []
            for segment in row:
                if isinstance(segment, T):
                    drawn = torch.randint(FIRST_TEXT, VOCAB, (segment.n,), generator=rng)
                    ids += [int(i) for i in drawn]
                    continue
                vision = (
                    self.image(model, segment, rng)
                    if isinstance(segment, I)
                    else self.video(model, segment, rng)
                )
                ids += vision.ids
                visions.append(vision)
            all_ids.append(ids)
            all_vision.append(visions)
        if only is not None:
            all_ids, all_vision = [all_ids[only]], [all_vision[only]]

        length = max(len(ids) for ids in all_ids)
        batch = Batch()
        input_ids = torch.full((len(all_ids), length), PAD)
        mask = torch.zeros_like(input_ids)
        batch.spans = []
        for r, (ids, visions) in enumerate(zip(all_ids, all_vision, strict=True)):
            start = length - len(ids) if padding == "left" else 0
            input_ids[r, start : start + len(ids)] = torch.tensor(ids)
            mask[r, start : start + len(ids)] = 1
            batch.spans.append(self._spans(rows[r if only is None else only], visions, start))
        batch["input_ids"], batch["attention_mask"] = input_ids, mask
        batch.update(self.collate(all_vision))
        batch.update(self.extras(model, batch))
        return batch

    def _spans(
        self, row: Sequence[Segment], visions: list[Vision], start: int
    ) -> list[tuple[int, int]]:
        spans, at, pending = [], start, iter(visions)
        for segment in row:
            if isinstance(segment, T):
                at += segment.n
                continue
            ids = next(pending).ids
            where = [i for i, token in enumerate(ids) if token in self.visual_ids]
            spans.append((at + where[0], at + where[-1] + 1))
            at += len(ids)
        return spans

    def visual_mask(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """bool [B, T]: the visual tokens, that is image and video placeholders only (not the
        start, end, break or newline tokens around them, which are text to the decoder)."""
        return torch.isin(batch["input_ids"], torch.tensor(self.visual_ids))

    def visual_spans(self, model: PreTrainedModel, batch: Batch) -> list[list[tuple[int, int]]]:
        """Per row, (start, end) of each image or video. A span may hold a few text positions
        (row breaks, tile separators) besides visual tokens."""
        return batch.spans


def features(output: Any) -> int:
    """Number of visual tokens in what get_image_features or get_video_features returned."""
    pooled = getattr(output, "pooler_output", output)
    parts = pooled if isinstance(pooled, (list, tuple)) else [pooled]
    return sum(part.numel() // part.shape[-1] for part in parts)


def randomise(model: nn.Module, gain: float) -> None:
    """Weights under which logits depend on the image and attention is far from uniform.

    Matrices get ``gain / sqrt(fan_in)``, embeddings 1, vectors a little noise around what they
    were (norms are centred on 0 or 1, by family). Zero-initialised matrices come alive, too.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                fan_in = max(1, parameter[0].numel())
                parameter.copy_(noise * gain / fan_in**0.5)
            else:
                parameter.add_(0.1 * noise)


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether forward() has this argument; some were renamed between releases."""
    return name in inspect.signature(model.forward).parameters


def pixels(*shape: int, rng: torch.Generator) -> Tensor:
    """Random pixels, normalised as a processor would leave them."""
    return torch.randn(*shape, generator=rng)


TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
    # mixtures of experts
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
# For families with sliding windows: 8 layers of both kinds, and a window that prompts exceed.
WINDOW = 16
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
PATCH = 4
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "image_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "vision_use_head": False,
}


def tiny(
    config_class: type[PreTrainedConfig], defaults: dict[str, Any], **changes: Any
) -> PreTrainedConfig:
    """A config of ``config_class``: those of ``defaults`` that it knows, and all ``changes``."""
    known = {f.name for f in fields(config_class)}
    return config_class(**{**{k: v for k, v in defaults.items() if k in known}, **changes})


def text(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A tiny text config: 8 layers, 4 heads on 2 KV heads."""
    return tiny(config_class, TEXT, **changes)


def vision(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A tiny vision config: 2 layers, patches of 4 pixels."""
    return tiny(config_class, VISION, **changes)
