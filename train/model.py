"""The architecture of st3-tiny: a SigLIP tower, a projector and a LLaMA decoder."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from train.scenes import IMAGE_SIZE
from train.tokenizer import PATCH_SIZE


def build_config(
    tokenizer: PreTrainedTokenizerFast,
    layers: int = 16,
    hidden: int = 256,
    vision_layers: int = 4,
    vision_hidden: int = 192,
) -> LlavaConfig:
    """12.5 M parameters by default (25 MB in bf16); tests use smaller ones."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=4 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_hidden // 32,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def build_model(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    """A new model; what the decoder layers add starts small, as in GPT-2 (1 / sqrt(2 L))."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    scale = (2 * config.text_config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
        position = model.model.vision_tower.embeddings.position_embedding.weight
        position.add_(place_codes(*position.shape))
    return model


def place_codes(patches: int, hidden: int, norm: float = 6.0) -> torch.Tensor:
    """What marks the row and the column (of 3 each) of every patch: (patches, hidden).

    Naming objects needs no positions.  With a weak position embedding the tower lost them (a
    linear probe read the row off its output for 39 % of the patches), and questions about
    places were learnt very slowly.  Six orthogonal directions as strong as the patches stay.
    """
    side = int(patches**0.5)
    third = torch.arange(side) * 3 // side
    codes = norm * torch.linalg.qr(torch.randn(hidden, 6)).Q.T
    return (codes[:3][third][:, None] + codes[3:][third][None]).flatten(0, 1)


def run_decoder(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    features: torch.Tensor,
    position_ids: torch.Tensor,
    attend: torch.Tensor,
    depths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The decoder's last hidden states, what enters each layer, and the rotary cos and sin.

    ``features`` are the projected patches (V, patches, hidden) in the order of their tokens;
    ``attend`` (B, 1, T, T) says which token sees which; from layer ``depths`` (B,) on a row's text
    no longer sees its visual tokens.  Without depths the same as the model's own forward,
    which gives the states between the layers only through hooks that compiled layers break on.
    """
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(input_ids)
    visual = (input_ids == model.config.image_token_id)[..., None]
    hidden = hidden.masked_scatter(visual, features.to(hidden.dtype))
    rotary = decoder.rotary_emb(hidden, position_ids)
    entering = []
    shown = visual[:, None] | ~visual[:, None].transpose(2, 3)
    for number, layer in enumerate(decoder.layers):
        entering.append(hidden)
        mask = attend
        if depths is not None and bool((depths <= number).any()):
            mask = attend & (shown | (depths > number)[:, None, None, None])
        hidden = layer(
            hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary
        )
    return decoder.norm(hidden), entering, rotary
