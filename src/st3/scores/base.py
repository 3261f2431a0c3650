"""What a score may look at, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class LayerView:
    """What one decoder layer shows of a prompt during prefill.

    ``B`` rows, ``N`` columns still present in this layer (text, kept visual tokens, padding),
    ``K >= N`` keys (more than ``N`` only when an earlier turn is in the cache: the new columns are
    the last ``N``).

    Attributes:
        layer: decoder layer, 0-based.
        query: [B, query heads, N, head size], after RoPE.
        key: [B, KV heads, K, head size], after RoPE.
        scaling: factor on ``query @ key``.
        softcap: tanh cap on the scaled logits (Gemma 2), or None.
        hidden: [B, N, hidden size], the layer's input; None before the first layer has run.
        visual: [B, N] bool, the visual tokens still present.
        ordinal: [B, N] int, a visual token's place among its row's original visual tokens.
        last: [B] int, column of the prompt's last token.
        key_valid: [B, K] bool, keys that are neither padding nor dropped; None when all are.
    """

    layer: int
    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    hidden: Tensor | None
    visual: Tensor
    ordinal: Tensor
    last: Tensor
    key_valid: Tensor | None

    @property
    def first_column(self) -> int:
        """Index among the keys of column 0."""
        return self.key.shape[-2] - self.visual.shape[-1]

    def last_row_logits(self) -> Tensor:
        """Scaled attention logits of the prompt's last token over the keys, [B, heads, K], fp32.

        Keys after the last token (candidates of assisted decoding, right padding), padding and
        dropped keys are -inf. Sliding windows are left out on purpose: beyond a window the
        attention is exactly 0, which ranks nothing.
        """
        batch, heads, columns, size = self.query.shape
        kv_heads, keys = self.key.shape[1], self.key.shape[2]
        row = self.query[torch.arange(batch, device=self.last.device), :, self.last]
        row = row.view(batch, kv_heads, heads // kv_heads, size)
        # Long operand first: on CPUs `key @ row` is up to 40 times faster than `row @ key^T`.
        logits = torch.matmul(self.key, row.transpose(-1, -2)).transpose(-1, -2)
        logits = logits.reshape(batch, heads, keys).float() * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        past = keys - columns
        seen = torch.arange(keys, device=self.last.device) <= (self.last + past)[:, None]
        if self.key_valid is not None:
            seen = seen & self.key_valid
        return logits.masked_fill(~seen[:, None], float("-inf"))


class Score(Protocol):
    """Ranks the visual tokens of a prompt: the higher, the longer a token is kept."""

    @property
    def name(self) -> str: ...

    def __call__(self, view: LayerView) -> Tensor:
        """Scores of all columns, [B, N] float; only visual columns are read."""
        ...
