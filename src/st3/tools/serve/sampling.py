"""The next token of a row: greedy, or drawn with a generator of the request's own."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Fields of a model's generation_config that change logits and that rows do not apply.
_UNSUPPORTED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "min_p": None,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}


def check_generation_config(config: Any) -> None:
    """Raise ``ValueError`` for a model whose generation_config asks for what is not supported."""
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"the model's generation_config sets {name}={value!r}, which st3 serve does not "
                "apply: take it out of generation_config.json"
            )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None: as the model's generation_config says, else greedy.

    Attributes:
        temperature: 0, and what is next to it (:data:`GREEDY_BELOW`), is greedy.
        top_p: share of the probability to draw from.
        seed: of the request's own generator; None draws one.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


# Below it the highest logit takes all, and logits over the temperature overflow in float32.
GREEDY_BELOW = 1e-5


class Sampler:
    """Chooses a row's tokens, the same ones whatever else is in the batch."""

    def __init__(self, sampling: Sampling, config: Any, prompt: Sequence[int]) -> None:
        temperature, top_p = sampling.temperature, sampling.top_p
        samples = bool(getattr(config, "do_sample", False)) or temperature is not None
        if temperature is None:
            temperature = getattr(config, "temperature", None)
            temperature = 1.0 if temperature is None else temperature
            samples = samples or top_p is not None or sampling.seed is not None
        if top_p is None:
            top_p = getattr(config, "top_p", None)
        self.greedy = not samples or temperature < GREEDY_BELOW
        self.processors = LogitsProcessorList()
        penalty = getattr(config, "repetition_penalty", None)
        if penalty not in (None, 1.0):
            self.processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        self._ids = list(prompt) if self.processors else []
        self._generator: torch.Generator | None = None
        if self.greedy:
            return
        # A generator on the CPU gives the same draws on every device.
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed(seed)
        if temperature != 1.0:
            self.processors.append(TemperatureLogitsWarper(float(temperature)))
        top_k = getattr(config, "top_k", None)
        if getattr(config, "do_sample", False) and top_k:
            self.processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            self.processors.append(TopPLogitsWarper(top_p))

    @property
    def plain(self) -> bool:
        """Whether the token is simply the one of the highest logit."""
        return self.greedy and not self.processors

    def choose(self, logits: Tensor) -> int:
        """The next token, of its logits [V]."""
        scores = logits[None]
        if self.processors:
            ids = torch.tensor([self._ids], dtype=torch.long, device=logits.device)
            scores = self.processors(ids, scores)
        if self._generator is None:
            token = int(scores.argmax())
        else:
            shares = scores[0].softmax(dim=-1).cpu()
            token = int(torch.multinomial(shares, 1, generator=self._generator))
        if self._ids:
            self._ids.append(token)
        return token
