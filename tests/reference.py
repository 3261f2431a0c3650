"""The slow reference: what trimming must compute, said in the plainest way.

All tokens stay in every layer. A visual token that was dropped is hidden, as a key, from the layer
where it was dropped on; its own row still runs through the layers, but nobody sees it. So the
outputs at all other positions are exactly those of a model from which it was taken out.

Everything happens in one attention function, registered under a name of its own and set on the text
config of the model for the time of the call. It hands the work to the family's own eager attention,
with the mask changed, and keeps the attention of the last prompt row. Nothing here is shared with
the code under test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from st3.hf.call import CACHE
from tests.reference_facts import FakeSchedule as FakeSchedule
from tests.reference_facts import ReferenceResult, Schedule, Score, Seen, Spans

NAME = "slow_reference"


@dataclass
class _Pass:
    """One generate() or forward(): who is kept where, and the scores, filled at prefill."""

    schedule: Schedule
    visual: Tensor  # bool [B, T]
    valid: Tensor  # bool [B, T], False at padding
    spans: Spans | None
    score: Score | None
    rank: str
    recall: int | None = None  # decode steps between choices among all kept tokens
    heads: bool = False  # whether each KV head shows its own
    head_scores: dict[int, Tensor] = field(default_factory=dict)  # [B, KV heads, T]
    kept: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    rank_scores: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    plain: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    queries: dict[int, tuple[Tensor, float, float | None]] = field(default_factory=dict)
    parts: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    layers: int = 0

    def seen(self, layer: int, kept: Tensor, **more: Any) -> Seen:
        return Seen(
            layer, self.inputs, kept, self.visual, self.valid, self.spans, self.scores, self.keys,
            self.plain, self.queries, self.parts, self.kept, self.schedule, self.layers, **more,
        )  # fmt: skip

    def early(self, layer: int, below: int | None) -> None:
        """Take the score of a layer's input."""
        if self.score is None or self.score.stage == "attention":
            return
        if below is None or self.score.stage == "input":
            kept = self.valid if below is None else self.kept[below]
            self.scores[layer] = self.score.of(self.seen(layer, kept))
        else:
            self.scores[layer] = self.scores[below]

    def groups(self, row: int) -> list[Tensor]:
        """The sets of positions that share a budget: all of a row, or each image."""
        if self.spans is None:
            return [self.visual[row]]
        groups = []
        for start, end in self.spans[row]:
            group = torch.zeros_like(self.visual[row])
            group[start:end] = self.visual[row, start:end]
            groups.append(group)
        return groups

    def choose(self, among: Tensor, scores: Tensor, count: Callable[[int], int]) -> Tensor:
        """bool [B, T]: in each group, the ``count(n)`` best of ``among``; ties: lower position."""
        chosen = torch.zeros_like(among)
        for row in range(len(among)):
            for group in self.groups(row):
                wanted = count(self.size(row, group))
                places = (among[row] & group).nonzero().flatten()
                order = scores[row, places].argsort(descending=True, stable=True)
                chosen[row, places[order[:wanted]]] = True
        return chosen

    def size(self, row: int, group: Tensor) -> int:
        """The number that a group's shares are taken of."""
        if self.score is None or self.score.above is None:
            return int(group.sum())
        return sum(float(value) > self.score.above for value in self.scores[0][row][group])

    def prefill(self, layer: int, below: int | None) -> Tensor:
        """Who is there in ``layer``, given the layer before it."""
        self.early(layer, below)
        source = below if layer not in self.scores else layer
        if source is None:
            self.kept[layer] = self.valid.clone()
            return self.kept[layer]
        before = self.valid if below is None else self.kept[below]
        visual = before & self.visual
        chosen = self.choose(visual, self.scores[source], lambda n: self.schedule.kept(layer, n))
        fewer = bool((chosen != visual).any())
        self.kept[layer] = (before & ~self.visual) | chosen
        # The scores of the latest decision, for rank="decision".
        self.rank_scores[layer] = (
            self.scores[source]
            if fewer or below is None
            else self.rank_scores.get(below, self.scores[source])
        )
        return self.kept[layer]

    def decode(self, layer: int, step: int) -> Tensor:
        """Which prompt positions ``layer`` shows in decode step ``step``, [B, T], or [B, KV heads,
        T] where heads differ."""
        kept = self.kept[layer]
        if self.heads and layer in self.head_scores:
            by_head = self.head_scores[layer].unbind(1)
            return torch.stack([self._shown(kept, layer, step, ranks) for ranks in by_head], 1)
        source = self.scores if self.rank == "own" else self.rank_scores
        return self._shown(kept, layer, step, source.get(layer, self.scores[layer]))

    def _shown(self, kept: Tensor, layer: int, step: int, ranks: Tensor) -> Tensor:
        chosen = self.choose(
            kept & self.visual, ranks, lambda n: self.schedule.visible(layer, n, step)
        )
        return (kept & ~self.visual) | chosen


_current: _Pass | None = None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The family's own eager attention, with dropped visual tokens hidden."""
    now = _current
    assert now is not None, "the reference is not running"
    eager = sys.modules[type(module).__module__].eager_attention_forward
    layer = module.layer_idx
    batch, _, q_len, _ = query.shape
    k_len, prompt = key.shape[2], now.valid.shape[1]
    kv_heads = key.shape[1] if now.heads else 1
    hidden = torch.zeros(batch, kv_heads, q_len, k_len, dtype=torch.bool)
    prefill = k_len == q_len
    if prefill:
        below = max((i for i in now.kept if i < layer), default=None)
        hidden[..., :] = ~now.prefill(layer, below)[:, None, None, :]
    else:
        for i in range(q_len):
            step = k_len - q_len + i - prompt + 1
            shown = now.decode(layer, step)
            hidden[:, :, i, :prompt] = ~(shown if shown.dim() == 3 else shown[:, None])
    assert attention_mask is not None, "eager attention has a mask"
    if now.heads:
        hidden = hidden.repeat_interleave(query.shape[1] // kv_heads, 1)
    mask = attention_mask[..., :k_len].expand(batch, hidden.shape[1], -1, -1)
    mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)
    output = eager(module, query, key, value, mask, **kwargs)
    if prefill:
        _measure(now, layer, query, key, kwargs)
    elif now.recall and q_len == 1 and (k_len - prompt) % now.recall == 0:
        _recall(now, layer, query, key, kwargs)
    return output


@torch.no_grad()
def _measure(now: _Pass, layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """The last valid prompt row's softmax attention, mean over all query heads; over the keys
    that are there, without any sliding window or chunk."""
    rows = torch.arange(len(query))
    now.keys[layer] = key
    now.queries[layer] = (query, kwargs["scaling"], kwargs.get("softcap"))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    positions = torch.arange(now.valid.shape[1])
    last = (now.valid * positions).argmax(-1)
    logits = torch.einsum("bhd,bhtd->bht", query[rows, :, last], key) * kwargs["scaling"]
    if (softcap := kwargs.get("softcap")) is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~now.kept[layer][:, None], -torch.inf)
    attention = logits.float().softmax(-1).mean(1)
    if now.score is None:
        now.scores[layer] = attention
    elif now.score.stage == "attention" or now.score.later is not None:
        seen = now.seen(layer, now.kept[layer], scaling=kwargs["scaling"])
        seen.softcap = kwargs.get("softcap")
        seen.query, seen.key, seen.attention = query, key, attention
        now.scores[layer] = (now.score.later or now.score.of)(seen)
    if now.heads:
        now.head_scores[layer] = _by_head(now, layer, logits, query, key, kwargs)


def _by_head(
    now: _Pass, layer: int, logits: Tensor, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """What each KV head's own query heads say, [B, KV heads, T]; ``key`` is repeated for them."""
    kv_heads = now.keys[layer].shape[1]
    share = query.shape[1] // kv_heads
    found = []
    for head in range(kv_heads):
        own = slice(head * share, (head + 1) * share)
        attention = logits[:, own].float().softmax(-1).mean(1)
        if now.score is None:
            found.append(attention)
            continue
        seen = now.seen(layer, now.kept[layer], scaling=kwargs["scaling"])
        seen.softcap = kwargs.get("softcap")
        seen.query, seen.key, seen.attention = query[:, own], key[:, own], attention
        size, plain = query.shape[-1], dict(now.plain)
        for name, heads in (("q", own), ("k", slice(head, head + 1))):
            if (layer, name) in plain:
                every = plain[layer, name].reshape(*now.valid.shape, -1, size)
                plain[layer, name] = every[:, :, heads].flatten(2)
        seen.plain = plain
        found.append((now.score.later or now.score.of)(seen))
    return torch.stack(found, 1)


def _recall(now: _Pass, layer: int, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """From the next step on a layer shows, of all tokens that it kept, those that the current one
    attends to most; hidden ones are looked at, too."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhd,bhtd->bht", query[:, :, 0], key) * kwargs["scaling"]
    if (softcap := kwargs.get("softcap")) is not None:
        logits = torch.tanh(logits / softcap) * softcap
    prompt = now.valid.shape[1]
    gone = torch.zeros(len(query), key.shape[2], dtype=torch.bool)
    gone[:, :prompt] = ~now.kept[layer]
    attention = logits.masked_fill(gone[:, None], -torch.inf).float().softmax(-1).mean(1)
    now.scores[layer] = attention[:, :prompt]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def _running(model: PreTrainedModel, now: _Pass) -> Iterator[None]:
    global _current
    config = model.config.get_text_config(decoder=True)
    before, _current = config._attn_implementation, now
    config._attn_implementation = NAME
    hooks = list(_watch(model, now)) if now.score is not None else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        config._attn_implementation, _current = before, None


def _watch(model: PreTrainedModel, now: _Pass) -> Iterator[Any]:
    """Note the inputs of the decoder layers, and queries and keys as they are projected."""
    inner = model.model
    text = getattr(inner, "language_model", None) or inner.text_model

    def note_input(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] == now.valid.shape[1]:
                now.inputs[layer] = hidden

        return hook

    def note_plain(layer: int, name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if output.dim() == 4 and output.shape[2] == now.valid.shape[1]:
                output = output.transpose(1, 2)  # some norms stand behind the transposition
            if output.shape[1] == now.valid.shape[1]:
                now.plain[layer, name] = output

        return hook

    def note_part(layer: int, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            if given.shape[1] == now.valid.shape[1]:
                made = output[0] if isinstance(output, tuple) else output
                now.parts[layer, name] = (given, made)

        return hook

    now.layers = len(text.layers)
    for i, layer in enumerate(text.layers):
        for name in ("self_attn", "mlp"):
            if isinstance(getattr(layer, name, None), torch.nn.Module):
                part = getattr(layer, name)
                yield part.register_forward_hook(note_part(i, name), with_kwargs=True)
        yield layer.register_forward_pre_hook(note_input(i), with_kwargs=True)
        for name in ("q", "k"):
            norm = getattr(layer.self_attn, f"{name}_norm", None)
            last = norm or getattr(layer.self_attn, f"{name}_proj", None)
            if last is not None:
                yield last.register_forward_hook(note_plain(i, name))


def _new_pass(
    batch: dict[str, Any],
    schedule: Schedule,
    visual_mask: Tensor,
    per_image_spans: Spans | None,
    score: Score | None,
    rank: str = "own",
    repeat: int = 1,
    recall: int | None = None,
    heads: bool = False,
) -> _Pass:
    valid = batch["attention_mask"].bool()
    if repeat > 1:
        valid = valid.repeat_interleave(repeat, 0)
        visual_mask = visual_mask.repeat_interleave(repeat, 0)
        if per_image_spans is not None:
            per_image_spans = [row for row in per_image_spans for _ in range(repeat)]
    return _Pass(schedule, visual_mask, valid, per_image_spans, score, rank, recall, heads)


def reference_prefill(
    model: PreTrainedModel,
    batch: dict[str, Any],
    schedule: Schedule,
    visual_mask: Tensor,
    *,
    per_image_spans: Spans | None = None,
    score: Score | None = None,
) -> ReferenceResult:
    """One forward over the prompt. Logits at dropped positions mean nothing.

    ``visual_mask`` bool [B, T]; ``per_image_spans`` gives each image its own budget.
    """
    now = _new_pass(batch, schedule, visual_mask, per_image_spans, score)
    with _running(model, now), torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    layers = sorted(now.kept)
    return ReferenceResult(logits, [now.kept[i] for i in layers], [now.scores[i] for i in layers])


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache that keeps every token, also in layers with a sliding window (their masks hide
    what lies outside it), so that key j is always position j."""
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = DynamicLayer()
    return cache


def reference_generate(
    model: PreTrainedModel,
    batch: dict[str, Any],
    schedule: Schedule,
    visual_mask: Tensor,
    max_new_tokens: int,
    *,
    per_image_spans: Spans | None = None,
    score: Score | None = None,
    rank: str = "own",
    recall: int | None = None,
    heads: bool = False,
    **generate: Any,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, new] and logits [B, new, V] of greedy decoding (``generate`` may ask for more:
    beams, sampling). The step of the forward that is fed the s-th generated token is s.

    ``rank="own"``: annealing orders a layer's tokens by the attention measured in that layer;
    ``"decision"``: by the scores of the latest decision at or before it. ``recall`` is the number
    of steps between new choices among all that a layer kept; ``heads``: each KV head orders a
    layer's tokens by its own query heads.
    """
    repeat = (
        generate.get("num_beams", 1)
        if generate.get("num_beams", 1) > 1
        else generate.get("num_return_sequences", 1)
    )
    now = _new_pass(
        batch, schedule, visual_mask, per_image_spans, score, rank, repeat, recall, heads
    )
    options = {"do_sample": False, **generate}
    with _running(model, now), torch.no_grad():
        out = model.generate(
            **batch,
            **{CACHE: full_cache(model)},
            max_new_tokens=max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    logits = torch.stack(out.logits, 1)
    return out.sequences[:, -logits.shape[1] :], logits
