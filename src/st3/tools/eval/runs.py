"""Run a batch of items: the untrimmed model's answers, and a trimmed model held against them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import st3
from st3.hf.call import CACHE
from st3.methods.policies import Policy
from st3.tools.common.chats import Asker, Chat, ask
from st3.tools.common.clock import Marks
from st3.tools.common.images import open_image
from st3.tools.eval.data import Item
from st3.tools.eval.shrink import Downsampler


@dataclass(frozen=True)
class Reference:
    """The untrimmed answers to a batch.

    Attributes:
        tokens: [B, n], padded behind the end.
        valid: [B, n] bool, tokens up to and with the end token.
        scores: n tensors [B, vocabulary], from which the tokens were chosen.
    """

    tokens: Tensor
    valid: Tensor
    scores: list[Tensor]
    seconds: float


@dataclass(frozen=True)
class Kept:
    """What a policy kept, and what that costs: mean share of the visual tokens over the layers,
    mean live KV bytes and prefill FLOPs over the untrimmed model's (None: no cost model)."""

    share: float
    kv: float
    flops: float | None


@dataclass(frozen=True)
class Followed:
    """A trimmed model led along the untrimmed answers.

    Attributes:
        kl: [B] summed over the tokens, KL divergence of the untrimmed model's next-token
            distribution from the trimmed one's, nats.
        agree: [B] tokens that the trimmed model would have chosen as well.
        seconds: of the whole generation, the vision tower included; as many tokens as untrimmed.
    """

    kl: list[float]
    agree: list[int]
    seconds: float
    kept: Kept


@dataclass(frozen=True)
class Talk:
    """Answers of one conversation, and the seconds that they took."""

    answers: list[str]
    tokens: list[list[int]]
    seconds: float
    kept: Kept


class _Follow(LogitsProcessor):
    """Notes the scores of each step; with ``tokens`` [B, n] these are chosen, whatever they say."""

    def __init__(self, tokens: Tensor | None = None) -> None:
        self.tokens = tokens
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores)
        if self.tokens is None:
            return scores
        step = self.tokens[:, len(self.scores) - 1, None]
        return torch.full_like(scores, float("-inf")).scatter(1, step, 0.0)


class Runner(Asker):
    """A model and its processor, asked in left-padded batches, greedily.

    ``shrink`` is the share of their pixels that images are made smaller to first, None to leave
    them as they are.

    Args:
        system: the system prompt of every conversation; None: none.
    """

    def __init__(self, model: Any, processor: Any, system: str | None = None) -> None:
        super().__init__(model, processor)
        self.system = system
        self._smaller = Downsampler(self)

    def _chats(self, items: Sequence[Item], shrink: float | None = None) -> list[Chat]:
        if shrink is None:
            return [_chat(item, self.system) for item in items]
        chats = []
        for item in items:
            images = [self._smaller(open_image(path), shrink) for path in item.images]
            chats.append(ask(images, item.turns[0].question, self.system))
        return chats

    def _kept(
        self, trimmer: Any, items: Sequence[Item], shrink: float | None, new_tokens: int
    ) -> Kept:
        if shrink is not None:
            chats = self._chats(items), self._chats(items, shrink)
            left = self._smaller.share(*chats, shrink, new_tokens)
            return Kept(left.tokens, left.kv, left.flops)
        report = trimmer.report
        return Kept(report.mean_share, report.kv_mean_ratio, report.prefill_flops_ratio)

    def _generate(self, inputs: Any, max_new_tokens: int, **more: Any) -> tuple[Tensor, float]:
        """New tokens [B, n], and seconds."""
        marks = Marks(self.model.device)
        marks.mark()
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **more
        )
        marks.mark()
        return output[:, inputs["input_ids"].shape[1] :], marks.seconds()[0]

    # Single questions and descriptions ------------------------------------------------------------

    def reference(self, items: Sequence[Item], max_new_tokens: int) -> Reference:
        """The untrimmed answers with their distributions."""
        follow = _Follow()
        tokens, seconds = self._generate(
            self.encode(self._chats(items)),
            max_new_tokens,
            logits_processor=LogitsProcessorList([follow]),
        )
        end = torch.isin(tokens, self.ends).long()
        valid = end.cumsum(1) - end == 0
        return Reference(tokens, valid, follow.scores, seconds)

    def follow(
        self,
        items: Sequence[Item],
        policy: Policy,
        reference: Reference,
        shrink: float | None = None,
    ) -> Followed:
        """Lead the trimmed model along the untrimmed answers (teacher forcing, step by step, so
        that annealing runs as in generation)."""
        follow = _Follow(reference.tokens)
        length = reference.tokens.shape[1]
        with st3.trim(self.model, policy) as trimmer:
            _, seconds = self._generate(
                self.encode(self._chats(items, shrink)),
                length,
                logits_processor=LogitsProcessorList([follow]),
            )
            kept = self._kept(trimmer, items, shrink, length)
        kl = torch.zeros(len(items))
        agree = torch.zeros(len(items), dtype=torch.long)
        for step, (wanted, given) in enumerate(zip(reference.scores, follow.scores, strict=True)):
            counts = reference.valid[:, step]
            true, own = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
            each = (true.exp() * (true - own)).nan_to_num(0.0).sum(-1)  # -inf on both sides: 0
            kl += torch.where(counts, each.clamp(min=0), 0.0).cpu()  # below 0: rounding
            agree += ((given.argmax(-1) == reference.tokens[:, step]) & counts).long().cpu()
        return Followed(kl.tolist(), agree.tolist(), seconds, kept)

    def answers(
        self,
        items: Sequence[Item],
        policy: Policy,
        max_new_tokens: int,
        shrink: float | None = None,
    ) -> tuple[list[str], list[list[int]]]:
        """What the trimmed model answers by itself, as text and as tokens with the end token."""
        with st3.trim(self.model, policy):
            tokens, _ = self._generate(self.encode(self._chats(items, shrink)), max_new_tokens)
        return self.texts(tokens), [self.cut(row) for row in tokens]

    # Conversations --------------------------------------------------------------------------------

    def converse(
        self, item: Item, policy: Policy, max_new_tokens: int, shrink: float | None = None
    ) -> Talk:
        """Ask the turns one after the other on ONE cache: what the first question dropped is gone
        for the later ones. The history is the model's own.

        Raises:
            ValueError: a chat template that changes the tokens of earlier turns.
        """
        (chat,), cache = self._chats([item], shrink), DynamicCache(config=self.model.config)
        answers: list[str] = []
        tokens: list[list[int]] = []
        seconds, past = 0.0, None
        untouched: AbstractContextManager[Any] = nullcontext()
        trimmer = st3.trim(self.model, policy)
        with trimmer if trimmer.active else untouched:
            for number, turn in enumerate(item.turns):
                if number:
                    said = [{"type": "text", "text": answers[-1]}]
                    chat += [{"role": "assistant", "content": said}]
                    chat += ask([], turn.question)
                inputs = self.encode([chat])
                if past is not None:
                    ids = inputs["input_ids"]
                    if not torch.equal(ids[:, : past.shape[1]], past):
                        raise ValueError(
                            "this model's chat template changes the tokens of earlier turns, so "
                            "conversations cannot go on from the cache: leave them out with --tasks"
                        )
                    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                new, took = self._generate(inputs, max_new_tokens, **{CACHE: cache})
                past = torch.cat([inputs["input_ids"], new], 1)[:, : cache.get_seq_length()]
                seconds += took
                tokens.append(self.cut(new[0]))
                answers += self.texts(new)
            kept = Kept(1.0, 1.0, 1.0)
            if trimmer.active or shrink is not None:
                kept = self._kept(trimmer, [item], shrink, sum(map(len, tokens)))
        return Talk(answers, tokens, seconds, kept)


def _chat(item: Item, system: str | None = None) -> Chat:
    return ask([open_image(path) for path in item.images], item.turns[0].question, system)
