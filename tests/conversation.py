"""The slow reference for what one prompt cannot show: several turns, and ranking anew.

As in tests/reference.py all tokens stay and dropped ones are hidden as keys; but here the whole
history of a conversation is kept, layer by layer: which tokens were dropped for good, and in which
order the first image's tokens are annealed. Images of later turns are pruned, not annealed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

import st3
from st3.hf.call import CACHE
from tests.reference import full_cache

NAME = "slow_conversation"
_running: Conversation | None = None


@dataclass
class Conversation:
    """Runs chunks of tokens one after the other. ``rerank``: steps between rankings, or None."""

    model: PreTrainedModel
    schedule: st3.Schedule
    rerank: int | None = None
    visual: Tensor | None = None  # [B, T] of the chunk under way
    valid: Tensor | None = None  # [B, T], of the whole conversation so far
    first: Tensor | None = None  # the first prompt's visual tokens, if it had any
    gone: dict[int, Tensor] = field(default_factory=dict)  # [B, T]: dropped in prefill
    order: dict[int, Tensor] = field(default_factory=dict)  # [B, T of the first]: importance
    scores: dict[int, Tensor] = field(default_factory=dict)  # of the chunk under way

    def __post_init__(self) -> None:
        self.cache = full_cache(self.model)

    @torch.no_grad()
    def chunk(self, inputs: dict[str, Any], visual: Tensor | None = None) -> Tensor:
        """The logits of a further chunk; ``inputs`` hold the mask of all tokens so far."""
        self.valid, self.scores = inputs["attention_mask"].bool(), {}
        self.visual = visual if visual is not None and bool(visual.any()) else None
        if self.visual is not None and self.visual.shape == self.valid.shape:
            self.first = self.visual
        with self._in_charge():
            return self.model(**inputs, **{CACHE: self.cache}, use_cache=True).logits

    @contextmanager
    def _in_charge(self) -> Iterator[None]:
        global _running
        config = self.model.config.get_text_config(decoder=True)
        before, _running = config._attn_implementation, self
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation, _running = before, None

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, kwargs: Any
    ) -> Any:
        layer, queries, keys = module.layer_idx, query.shape[2], key.shape[2]
        past = keys - queries
        if self.visual is not None:
            self._prune(layer, past)
        elif layer in self.gone:
            self.gone[layer] = torch.nn.functional.pad(self.gone[layer], (0, queries))
        gone = self.gone.get(layer, torch.zeros(len(query), keys, dtype=torch.bool))
        hidden = gone[:, None].repeat(1, queries, 1)
        for i in range(queries):
            # All of a chunk with an image see of the first image what the chunk's first token sees.
            position = past + i if self.visual is None else past
            hidden[:, i] |= self._annealed(layer, position, keys)
        full = mask[..., :keys].masked_fill(hidden[:, None], torch.finfo(query.dtype).min)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output = eager(module, query, key, value, full, **kwargs)
        if self.visual is not None and (window := getattr(module, "sliding_window", None)):
            hidden |= torch.arange(keys) <= past - window  # old, and behind every window
        self._measure(layer, query, key, hidden, kwargs["scaling"])
        return output

    def _prune(self, layer: int, past: int) -> None:
        """Drop the chunk's visual tokens that this layer does not keep."""
        assert self.visual is not None
        below = self.gone.get(layer - 1)
        dropped = torch.zeros_like(self.visual) if below is None else below[:, past:].clone()
        for row, visual in enumerate(self.visual):
            wanted = self.schedule.kept(layer, int(visual.sum()))
            places = (visual & ~dropped[row]).nonzero().flatten()
            if len(places) > wanted:
                ranked = self.scores[layer - 1][row, past:][places].argsort(descending=True)
                dropped[row, places[ranked[wanted:]]] = True
        before = self.gone.get(layer)
        if before is None:
            before = torch.zeros(len(dropped), past, dtype=torch.bool)
        self.gone[layer] = torch.cat([before, dropped], 1)

    def _annealed(self, layer: int, position: int, keys: int) -> Tensor:
        """[B, keys]: tokens of the first image that the token at ``position`` no longer sees."""
        hidden = torch.zeros(self.valid.shape[0], keys, dtype=torch.bool)  # type: ignore[union-attr]
        if self.first is None or layer not in self.order:
            return hidden
        prompt = self.first.shape[1]
        for row, visual in enumerate(self.first):
            count = self.schedule.visible(layer, int(visual.sum()), position - prompt + 1)
            there = (visual & ~self.gone[layer][row, :prompt]).nonzero().flatten()
            ranked = there[self.order[layer][row, there].argsort(descending=True)]
            hidden[row, ranked[count:]] = True
        return hidden

    def _measure(
        self, layer: int, query: Tensor, key: Tensor, hidden: Tensor, scaling: float
    ) -> None:
        """The last token's attention over what is there, mean over heads, without windows."""
        assert self.valid is not None
        keys = key.shape[2]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = torch.einsum("bhd,bhtd->bht", query[:, :, -1], key) * scaling
        unseen = hidden[:, -1] | ~self.valid[:, :keys]
        attention = logits.masked_fill(unseen[:, None], -torch.inf).softmax(-1).mean(1)
        self.scores[layer] = attention
        if self.first is None:
            return
        prompt = self.first.shape[1]
        if self.visual is not None and keys == prompt:
            self.order[layer] = attention
        elif self.rerank and query.shape[2] == 1 and (keys - prompt) % self.rerank == 0:
            self.order[layer] = attention[:, :prompt]  # 0 where nothing is seen any more


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    assert _running is not None
    return _running.attend(module, query, key, value, attention_mask, kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
