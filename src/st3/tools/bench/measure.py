"""One measurement each: a prefill, a generation, and what a generation holds in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from st3.hf.cache import TrimmedLayer
from st3.hf.call import CACHE
from st3.hf.states import has_state
from st3.tools.bench.prompts import Prompt
from st3.tools.common.clock import Marks, MarkSteps
from st3.tools.common.memory import Peak


@dataclass(frozen=True)
class Generation:
    """Times of one generate() call, in seconds.

    Attributes:
        first: from the call to the first token; the vision tower is not in it.
        steps: of each further token.
        total: of the whole call.
    """

    first: float
    steps: tuple[float, ...]
    total: float


@dataclass(frozen=True)
class Footprint:
    """Bytes during one generate() call, and its decode steps beside others without a KV cache.

    Attributes:
        kv_live: KV entries that can still be seen, after the prefill and after each decode step.
        kv_allocated: the tensors that hold them.
        peak: highest memory use above that before the call; None where it cannot be measured.
        steps: seconds of each decode step.
        weights: seconds of a weights-only step right before each of them.
    """

    kv_live: tuple[int, ...]
    kv_allocated: tuple[int, ...]
    peak: int | None
    steps: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


def prefill(model: Any, prompt: Prompt) -> float:
    """Seconds of :func:`forward`."""
    marks = Marks(prompt.device)
    marks.mark()
    forward(model, prompt)
    marks.mark()
    return marks.seconds()[0]


@torch.no_grad()
def forward(model: Any, prompt: Prompt) -> None:
    """One forward pass of the prompt that fills a new cache and computes the logits of the last
    position, as generate() does."""
    model(
        input_ids=prompt.ids,
        attention_mask=prompt.mask,
        **{CACHE: _new_cache(model)},
        use_cache=True,
        logits_to_keep=1,
    )


def _new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def generation(model: Any, prompt: Prompt, new_tokens: int) -> Generation:
    """Generate exactly ``new_tokens`` tokens greedily and note when each of them was there."""
    marks = Marks(prompt.device)
    marks.mark()
    _generate(model, prompt, new_tokens, MarkSteps(marks))
    marks.mark()
    spans = marks.seconds()
    return Generation(spans[0], tuple(spans[1:-1]), sum(spans))


class WeightsOnly:
    """Decode steps behind two text tokens: next to no KV cache, all the weights. Made of the
    untouched model, its steps can be run within a method's context, whose work is on prompts."""

    @torch.no_grad()
    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.cache = model, _new_cache(model)
        ids = torch.ones(batch, 2, dtype=torch.long, device=model.device)
        self.token = ids[:, 1:]
        model(input_ids=ids, **{CACHE: self.cache}, use_cache=True)
        self.stateful = any(map(has_state, self.cache.layers))

    @torch.no_grad()
    def __call__(self) -> None:
        if self.cache.get_seq_length() > 2 and not self.stateful:
            self.cache.crop(-1)  # (a state cannot forget: there the cache grows by a token a step)
        self.model(input_ids=self.token, **{CACHE: self.cache}, use_cache=True)


def footprint(model: Any, prompt: Prompt, new_tokens: int, spare: WeightsOnly) -> Footprint:
    """Generate once more, and read what the cache and the process hold. Before each decode step
    comes a weights-only step: a shared machine's speed changes within seconds, so that figures of
    different runs do not add up. Both are timed from the forward pass's begin to its end."""
    cache, marks = _new_cache(model), Marks(prompt.device)
    watch = _WatchCache(cache, marks, spare)
    begins = model.register_forward_pre_hook(lambda *call: marks.mark(), prepend=True)
    try:
        with Peak(prompt.device) as peak:
            _generate(model, prompt, new_tokens, watch, **{CACHE: cache})
    finally:
        begins.remove()
    spans = marks.seconds()  # prefill; then what is between, weights, what is between, step ...
    weights, steps = spans[2:-1:4], spans[4::4]
    return Footprint(
        tuple(watch.live), tuple(watch.allocated), peak.bytes, tuple(steps), tuple(weights)
    )


def _generate(
    model: Any, prompt: Prompt, new_tokens: int, processor: LogitsProcessor, **more: Any
) -> None:
    """The settings of the subject's generation config let nothing stop it early."""
    output: Tensor = model.generate(
        input_ids=prompt.ids,
        attention_mask=prompt.mask,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([processor]),
        **more,
    )
    made = output.shape[1] - prompt.ids.shape[1]
    if made != new_tokens:
        raise ValueError(
            f"the model stopped after {made} of {new_tokens} tokens: unset eos_token_id in its "
            "generation_config"
        )


class _WatchCache(LogitsProcessor):
    """Behind every forward pass: marks its end, runs ``spare``, which marks its begin, marks its
    end, and notes the bytes of a cache."""

    def __init__(self, cache: DynamicCache, marks: Marks, spare: Callable[[], Any]) -> None:
        self.cache = cache
        self.marks = marks
        self.spare = spare
        self.live: list[int] = []
        self.allocated: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.mark()
        self.spare()
        self.marks.mark()
        sizes = [_bytes_of(layer) for layer in self.cache.layers]
        self.live.append(sum(live for live, _ in sizes))
        self.allocated.append(sum(allocated for _, allocated in sizes))
        return scores


def _bytes_of(layer: Any) -> tuple[int, int]:
    """Live and allocated bytes of one cache layer; in transformers' own they are the same."""
    if isinstance(layer, TrimmedLayer):
        return layer.store.footprint()
    held = sum(t.numel() * t.element_size() for t in _tensors(layer))
    return held, held


def _tensors(layer: Any) -> Sequence[Tensor]:
    held = (getattr(layer, name, None) for name in ("keys", "values"))  # a state has neither
    return [t for t in held if t is not None]
