"""The second model: a LLaVA of SmolLM2 and DINOv2, and the small part of it that is trained."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

# SmolLM2's own chat format, without its default system message; images come before the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2's
# Adapters weigh in with this over their rank.
STRENGTH = 2.0


def load_parts(
    inputs: Path,
) -> tuple[LlamaForCausalLM, Dinov2Model, PreTrainedTokenizerFast]:
    """Language model and tower in fp32, and the tokenizer, from a folder of ``train.smol.inputs``.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    language, tower = inputs / "language", inputs / "tower"
    if not language.is_dir() or not tower.is_dir():
        raise FileNotFoundError(
            f"{inputs} holds no language model and tower: run python -m train.smol.inputs"
        )
    gguf = next(language.glob("*.gguf"), None)
    # A GGUF file is dequantised while it is read; a plain folder, as tests use, is read as it is.
    quantised = {"gguf_file": gguf.name} if gguf else {}
    return (
        AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32, **quantised),
        Dinov2Model.from_pretrained(tower, dtype=torch.float32),
        AutoTokenizer.from_pretrained(language, **quantised),
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast, patch_size: int, image_size: int
) -> LlavaProcessor:
    """Adds the token ``<image>``; an image becomes ``(image_size / patch_size) ** 2`` tokens."""
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=8192,
    )
    images = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        resample=3,  # bicubic
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=own,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" leaves out
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def build(
    language: LlamaForCausalLM,
    tower: Dinov2Model,
    tokenizer: PreTrainedTokenizerFast,
    image_size: int = 336,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of the two, fp32, with a random projector.

    Raises:
        ValueError: if the patches do not fill an image of ``image_size`` pixels.
    """
    patch = tower.config.patch_size
    if image_size % patch:
        raise ValueError(f"image size {image_size} is no multiple of the patches' {patch} pixels")
    processor = build_processor(tokenizer, patch, image_size)
    known = language.get_input_embeddings().weight.shape[0]
    language.resize_token_embeddings(
        len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False
    )
    # A mean row's logit is the mean logit: no new row is ever the likeliest token.
    words = language.get_input_embeddings().weight
    words[known:] = words[:known].mean(0)

    text, vision = copy.deepcopy(language.config), copy.deepcopy(tower.config)
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    text.bos_token_id = processor.tokenizer.bos_token_id
    text.eos_token_id = processor.tokenizer.eos_token_id
    text.pad_token_id = processor.tokenizer.pad_token_id
    vision.image_size = image_size
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    weights = dict(tower.state_dict())
    places = "embeddings.position_embeddings"
    weights[places] = resized_places(weights[places], image_size // patch)
    model.model.vision_tower.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    return model.eval(), processor


def resized_places(places: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings (1, 1 + n * n, hidden) for ``side`` x ``side`` patches, as Dinov2Model
    interpolates them itself in every pass."""
    old = int((places.shape[1] - 1) ** 0.5)
    grid = places[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    if side != old:
        grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([places[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class LowRank(nn.Module):
    """A linear layer's weight plus a product of rank r, (out, in): LoRA (arXiv 2106.09685).

    As a parametrization, so that all who read the weight, training and merging alike, read the
    sum. ``up`` starts at zero: at first nothing changes.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        out, inner = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inner) * inner**-0.5)
        self.up = nn.Parameter(torch.zeros(out, rank))
        self.scale = STRENGTH / rank

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.scale * self.up @ self.down).to(weight.dtype)


def add_adapters(model: LlavaForConditionalGeneration, rank: int, tower_rank: int) -> None:
    """Freezes the model; what learns from now on are the projector and new low-rank adapters on
    all linear layers of the decoder and the tower. The frozen part becomes bf16, the rest fp32."""
    model.to(torch.bfloat16).requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    for part, size in (
        (model.model.language_model.layers, rank),
        (model.model.vision_tower.encoder, tower_rank),
    ):
        layers = [module for module in part.modules() if isinstance(module, nn.Linear)]
        for layer in layers if size else ():
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, size))


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, by name. Of the tower, whose layers have other names in each version of
    transformers, by number."""
    state: dict[str, torch.Tensor] = {}
    tower = "model.vision_tower."
    for name, p in model.named_parameters():
        if p.requires_grad:
            count = sum(known.startswith(tower) for known in state)
            state[f"{tower}{count}" if tower in name else name] = p.detach()
    return state


def load_trained(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts a :func:`trained_state` back.

    Raises:
        ValueError: if it is of another model.
    """
    own = trained_state(model)
    unlike = own.keys() ^ state.keys()
    unlike |= {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    if unlike:
        raise ValueError(f"the trained part does not fit the model: {sorted(unlike)[0]} differs")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def merge(model: nn.Module) -> None:
    """Adds the adapters to the weights and removes them."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.to(torch.bfloat16)
