"""Dimensions of the text decoder, read from a config. No model is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Lookahead = Literal["none", "image", "images", "prompt"]
"""Which later positions a token may see in prefill, besides all earlier ones: none; those of its
own image; those of all images; the whole prompt."""


@dataclass(frozen=True)
class LayerDims:
    """One decoder layer. Counts of weights are those of its matrices (no norms, no biases)."""

    heads: int
    kv_heads: int
    head_dim: int
    projections: int  # weights of the query, key, value and output projections
    dense: int  # other weights that every token passes: MLP, router, shared experts
    expert: int = 0  # weights of one expert
    experts: int = 0
    experts_per_token: int = 0
    window: int | None = None  # sliding window, in tokens
    lookahead: Lookahead = "none"
    value_dim: int | None = None  # of a value, where it is not head_dim (latent attention)
    source: int | None = None  # the layer whose KV entries it reads, where they are not its own
    last_only: bool = False  # whether generate()'s prefill runs it on the prompt's last token alone
    mixing: int = 0  # FLOPs a token of a state's rule and convolution, besides its weights
    state: int = 0  # numbers in a row's state, in place of KV entries

    @property
    def pair(self) -> int:
        """FLOPs of one (query, key) pair: its score and its part in the weighted sum of values."""
        return 2 * self.heads * (self.head_dim + (self.value_dim or self.head_dim))

    @property
    def entry(self) -> int:
        """Numbers in one KV entry: a key and a value for each KV head."""
        return self.kv_heads * (self.head_dim + (self.value_dim or self.head_dim))

    @property
    def held(self) -> int:
        """Numbers in one KV entry that the layer itself holds."""
        return self.entry if self.source is None else 0

    @property
    def mlp(self) -> int:
        """Weights that one token passes outside attention."""
        return self.dense + self.expert * self.experts_per_token

    def weights(self, batch: int = 1) -> int:
        """Weights that a decode step over ``batch`` rows reads at most: of the experts, those
        that differently routed rows choose."""
        used = min(self.experts, batch * self.experts_per_token)
        return self.projections + self.dense + self.expert * used


@dataclass(frozen=True)
class TextDims:
    """The text decoder: its layers, what comes before them, and the head."""

    hidden: int
    vocab: int
    layers: tuple[LayerDims, ...]
    inputs: int = 0  # weights that every token passes before the first layer (Gemma 4)
    in_order: bool = False  # whether an index counts KV entries by column: none can be annealed
    tied: bool = False  # input embeddings and lm_head are one matrix; changes no count here

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def sources(self) -> tuple[int | None, ...]:
        """For each layer the one whose KV entries it reads; None where a state is in their place,
        or where no token sees another one."""
        return tuple(
            None if not layer.heads else index if layer.source is None else layer.source
            for index, layer in enumerate(self.layers)
        )

    @property
    def lm_head(self) -> int:
        """Weights of the head."""
        return self.hidden * self.vocab

    @classmethod
    def from_config(cls, config: Any) -> TextDims:
        """Read the dimensions from a transformers config: of a vision-language model, or of its
        text decoder alone. Decoders that no closed form describes are built without weights (on the
        meta device) and counted (:mod:`st3.cost.count`).

        Raises ValueError for a decoder whose cost this model does not describe, and names why.
        """
        from st3.models import config_family

        return config_family(config).text_dims(config)
