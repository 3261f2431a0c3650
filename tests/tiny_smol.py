"""A random stand-in for the second model's inputs: a small Llama with a byte-level tokenizer that
cuts names into pieces, and a small DINOv2."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from train.scenes import sample_scene
from train.tasks import describe

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PATCH = 14
IMAGE = 6 * PATCH  # 36 visual tokens


def save_inputs(folder: Path) -> Path:
    """Write ``language/`` and ``tower/`` as ``train.smol.inputs`` does, and return the folder."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Few scenes: many names never get a token of their own.
    tokens.train_from_iterator([describe(sample_scene(seed)) for seed in range(20)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    torch.manual_seed(1)
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=5 * PATCH,  # not IMAGE: the position embeddings are resized
            patch_size=PATCH,
            use_mask_token=False,
        )
    )
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    tower.save_pretrained(folder / "tower")
    return folder
