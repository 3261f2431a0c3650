"""A slow reference for decoders whose layers are not all alike: tokens are removed, not hidden.

The reference of the other families keeps all tokens and masks those that are gone, which a layer
with a state cannot judge: the state would still take them in. Here one row at a time goes through a
plain loop over the decoder layers. A dropped token is cut out of the hidden states, an annealed one
out of the KV cache. Nothing of st3 is used: the counts are the paper's equations (:class:`Counts`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tests.slow_counts import Counts

STATES = ("linear_attention", "conv", "moe", "mlp")  # in the last two no token sees another
INDEXED = ("minimax_m3_vl", "mistral_large4", "hy_v4_vl")

# A text model's attention, which leaves behind what it was given. -----------------------------

_seen: dict[int, tuple[Tensor, Tensor, float, float | None]] = {}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> Any:
    _seen[module.layer_idx] = (query, key, given["scaling"], given.get("softcap"))  # type: ignore[index]
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return eager(module, query, key, value, mask, **given)


AttentionInterface.register("slow_rows", _attention)


class _Stop(Exception):
    pass


def text_of(model: Any) -> Any:
    """The text model, which runs the decoder layers."""
    text = getattr(model, "model", model).language_model
    return getattr(text, "model", text)


def text_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model hands to its text model."""
    text, found = text_of(model), {}

    def capture(*args: Any, **kwargs: Any) -> None:
        found.update(kwargs)
        raise _Stop

    text.forward = capture
    try:
        getattr(model, "model", model)(**inputs)
    except _Stop:
        pass
    finally:
        del text.forward
    return found


@dataclass
class Row:
    """One row: its prompt, the answer to it, and the logits of each of the answer's tokens.

    Attributes:
        visual: [T] bool.
        columns: for each layer the original places of the keys that its cache holds.
        scores: for each layer with entries of its own the places that entered it, and their scores.
        kept_places: for each layer the original places that entered it.
    """

    model: PreTrainedModel
    inputs: dict[str, Any]
    visual: Tensor
    counts: Counts
    logits: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    columns: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept_places: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text: Any = text_of(self.model)
        self.config: Any = self.text.config
        self.kind = self.model.config.model_type
        layers = self.config.num_hidden_layers
        self.types = getattr(self.config, "layer_types", None) or ["full_attention"] * layers
        self.shares = [
            getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False)
            for layer in self.text.layers[:layers]
        ]
        self.own = layers - sum(self.shares)
        self.first = 1 + next(i for i, kind in enumerate(self.types) if kind not in STATES)
        self.visual = self.visual.clone()
        self.visual[-1] = False  # the last token ranks the others
        self.n_visual = int(self.visual.sum())
        stateful = any(kind in STATES for kind in self.types)
        whole = stateful or self.kind in INDEXED
        self.cache = DynamicCache(config=self.config) if whole else DynamicCache()
        # A layer that goes by the columns of the one before sees what that one sees.
        borrows = (
            [getattr(la.self_attn, "skip_topk", False) for la in self.text.layers[:layers]]
            if (self.kind in INDEXED)
            else [False] * layers
        )
        self.counted_as = [max(j for j in range(i + 1) if not borrows[j]) for i in range(layers)]
        for i, layer in enumerate(self.cache.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):  # nothing leaves by itself
                self.cache.layers[i] = DynamicLayer()

    def kept(self, layer: int) -> int:
        return self.counts.kept(self.counted_as[layer], self.own, self.first, self.n_visual)

    @property
    def axis(self) -> int:
        """Of the tokens in hidden states."""
        return -3 if self.kind == "hy_v4_vl" else -2

    # Family by family -------------------------------------------------------------------------

    def _tables(self, embeds: Tensor, positions: Tensor) -> Any:
        if self.kind == "nemotron_h_omni":
            return None  # positions are the order of the states
        if self.kind.startswith(("gemma", "lfm3")):
            kinds = set(self.types) - set(STATES)
            return {kind: self.text.rotary_emb(embeds, positions[:1], kind) for kind in kinds}
        if self.kind.startswith(("qwen", "minicpm", "hy_")):
            thrice = positions.view(-1, 1, positions.shape[-1]).expand(3, 1, -1)
            return self.text.rotary_emb(embeds, thrice)
        return self.text.rotary_emb(embeds, position_ids=positions[:1])

    def _start(self, given: dict[str, Any], positions: Tensor) -> tuple[Tensor, Any, Any]:
        embeds, text, per_layer = given["inputs_embeds"], self.text, None
        if self.kind.startswith("gemma"):
            per_layer = text.project_per_layer_inputs(embeds, given["per_layer_inputs"])
        if self.kind == "granite4_vision":
            embeds = embeds * text.embedding_multiplier
        tables = self._tables(embeds, positions)
        if self.kind == "gemma3n":
            others = [_as_large(mix(embeds), embeds) for mix in text.altup_projections]
            embeds = torch.stack([embeds, *others])
        if self.kind == "hy_v4_vl":
            embeds = embeds.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        return embeds, tables, per_layer

    def _end(self, hidden: Tensor) -> Tensor:
        text = self.text
        if self.kind == "hy_v4_vl":
            hidden = text.hc_head(hidden)
        if self.kind == "gemma3n":
            others = [
                _as_large(mix(hidden[i + 1]), hidden[0])
                for i, mix in enumerate(text.altup_unembed_projections)
            ]
            hidden = torch.stack([hidden[0], *others]).mean(0)
        norms = (getattr(text, name, None) for name in ("norm", "embedding_norm", "norm_f"))
        norm = next(norm for norm in norms if norm is not None)
        head = getattr(self.model, "lm_head", None) or self.model.language_model.lm_head
        logits = head(norm(hidden)[:, -1])
        if self.kind == "granite4_vision":
            logits = logits / self.config.logits_scaling
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _layer(
        self, i: int, hidden: Tensor, tables: Any, per_layer: Any, mask: Any, shared: Any,
        here: Tensor,
    ) -> Tensor:  # fmt: skip
        more: dict[str, Any] = {}
        if tables is not None:
            chosen = tables.get(self.types[i], ()) if isinstance(tables, dict) else tables
            more["position_embeddings"] = tuple(t.index_select(-2, here) for t in chosen)
        if self.kind.startswith("gemma"):
            more |= {"shared_kv_states": shared, "per_layer_input": per_layer[:, here, i]}
        if self.kind in INDEXED and self.kind != "minimax_m3_vl":
            more |= {"prev_topk_indices": self._chosen, "position_ids": self._places[:1, here]}
        if self.kind == "mistral_large4":
            more["shared_kv_states"] = shared
        layer = self.text.layers[i]
        out = layer(
            hidden,
            attention_mask=mask,
            **{cache_name(layer): self.cache},
            **more,
        )
        if isinstance(out, tuple):
            out, self._chosen = out[0], out[1] if len(out) > 1 else None
        return out

    # The loop ---------------------------------------------------------------------------------

    def _mask(self, queries: Tensor, keys: Tensor, i: int) -> Tensor:
        seen = keys[None] <= queries[:, None]
        if self.types[i] == "sliding_attention":
            seen &= keys[None] > queries[:, None] - self.config.sliding_window
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return hidden[None, None]

    def _choose(self, i: int, latest: int | None, here: Tensor) -> Tensor:
        """Which of the columns ``here`` enter layer ``i``, [N] bool."""
        flags = self.visual[here]
        wanted = self.kept(i)
        if latest is None or wanted >= int(flags.sum()):
            return torch.ones_like(flags)
        places, score = self.scores[latest]
        score = score[torch.isin(places, here)].masked_fill(~flags, -1)
        stay = ~flags
        stay[score.argsort(descending=True, stable=True)[:wanted]] = True
        return stay

    def _run(self, given: dict[str, Any], positions: Tensor, first: int, prompt: bool) -> Tensor:
        """[1, vocabulary], of the last of a pass's columns; ``first`` is its first's place."""
        hidden, tables, per_layer = self._start(given, positions)
        self._places, self._chosen = positions, None
        here = torch.arange(hidden.shape[self.axis])
        late = given.get("deepstack_features") or {}
        shared: dict[str, Any] = {}
        sources: dict[str, int] = {}
        latest: int | None = None
        for i, kind in enumerate(self.types):
            if i in late:
                visual = given["vision_mask"][0].reshape(len(self.visual), -1)[:, 0]
                number = (visual.cumsum(0) - 1)[here]
                add = visual[here]
                hidden = hidden.clone()
                hidden[0, add] += late[i][number[add]]
            if prompt and not self.shares[i]:
                stay = self._choose(i, latest, here)
                here, hidden = here[stay], hidden.index_select(self.axis, stay.nonzero()[:, 0])
            if prompt:
                self.kept_places[i] = here
            queries, mask = here + first, None
            if self.shares[i]:
                mask = self._mask(queries, self.columns[sources[kind]], i)
            elif kind not in STATES:
                sources[kind] = i
                old = self.columns.get(i, torch.zeros(0, dtype=torch.long))
                self.columns[i] = torch.cat([old, queries])
                mask = self._mask(queries, self.columns[i], i)
            hidden = self._layer(i, hidden, tables, per_layer, mask, shared, here)
            if prompt and kind not in STATES and not self.shares[i]:
                self.scores[i], latest = (here, self._score(i, first)[-len(here) :]), i
        return self._end(hidden)

    def _score(self, i: int, first: int) -> Tensor:
        """Attention of the last column over the keys, mean over heads, [K]: without the window of
        the layer, but for keys of an earlier turn that no column of this one sees."""
        query, key, scaling, softcap = _seen[i]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query[:, :, -1:] @ key.transpose(2, 3)) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if self.types[i] == "sliding_attention":
            gone = self.columns[i] <= first - self.config.sliding_window
            logits = logits.masked_fill(gone, -torch.inf)
        return logits.softmax(-1).mean(1)[0, 0]

    def _anneal(self, step: int) -> None:
        for i, columns in self.columns.items():
            places, score = self.scores[i]
            flags = self.visual[places]
            shown = self.counts.visible(self.kept(i), self.n_visual, step)
            ranked = places[flags][score[flags].argsort(descending=True, stable=True)]
            stay = ~torch.isin(columns, ranked[shown:])
            self.columns[i] = columns[stay]
            layer: Any = self.cache.layers[i]
            layer.keys, layer.values = layer.keys[:, :, stay], layer.values[:, :, stay]

    @torch.no_grad()
    def generate(self, new: int) -> Row:
        """Greedy, ``new`` tokens."""
        with _slow(self.config):
            given = text_inputs(self.model, self.inputs)
            self.length = given["inputs_embeds"].shape[1]
            positions = given.get("position_ids")
            if positions is None:
                positions = torch.arange(self.length)[None]
            elif positions.dim() == 3:
                positions = positions[-3:, 0]
            logits = self._run(given, positions, 0, True)
            self.top = int(positions.max())
            for step in range(1, new + 1):
                self.logits.append(logits[0])
                self.tokens.append(int(logits.argmax()))
                if step == new:
                    break
                self._anneal(step)
                logits = self._feed(torch.tensor([[self.tokens[-1]]]), step)
        return self

    @torch.no_grad()
    def append(self, ids: Tensor) -> Tensor:
        """Logits behind a further turn [1, n] that begins with the answer's last token."""
        with _slow(self.config):
            return self._feed(ids, len(self.tokens))[0]

    @torch.no_grad()
    def show(self, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Logits behind a further turn with an image, which begins with the answer's last token.
        ``inputs`` hold its ``position_ids`` [3 or none, 1, n]. Nothing may be annealed."""
        self.visual = visual
        self.n_visual = int(visual.sum())
        with _slow(self.config):
            given = text_inputs(self.model, inputs)
            positions = inputs["position_ids"]
            positions = positions[:, 0] if positions.dim() == 3 else positions
            return self._run(given, positions, self.length + len(self.tokens) - 1, True)[0]

    def _feed(self, ids: Tensor, step: int) -> Tensor:
        given = text_inputs(self.model, {"input_ids": ids})
        places = torch.arange(ids.shape[1])[None]
        return self._run(given, places + self.top + step, self.length + step - 1, False)


def _types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or []


class _slow:
    """A config's attention is the one of this file."""

    def __init__(self, config: Any) -> None:
        self.config, self.before = config, config._attn_implementation

    def __enter__(self) -> None:
        # Models with an index look at the kernel's name, so that theirs must be "eager".
        self.module: Any = None
        if any("index" in kind or "sparse" in kind for kind in _types(self.config)):
            name = type(self.config).__module__.replace("configuration_", "modeling_")
            self.module = sys.modules[name]
            self.eager = self.module.eager_attention_forward
            self.module.eager_attention_forward = self._noted
            self.config._attn_implementation = "eager"
        else:
            self.config._attn_implementation = "slow_rows"

    def _noted(self, module: Any, query: Tensor, key: Tensor, *args: Any, **given: Any) -> Any:
        _seen[module.layer_idx] = (query, key, given["scaling"], None)
        return self.eager(module, query, key, *args, **given)

    def __exit__(self, *error: object) -> None:
        if self.module is not None:
            self.module.eager_attention_forward = self.eager
        self.config._attn_implementation = self.before


def cache_name(layer: nn.Module) -> str:
    """What a decoder layer of the installed transformers calls its cache."""
    import inspect

    names = inspect.signature(type(layer).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _as_large(new: Tensor, old: Tensor) -> Tensor:
    """Gemma 3n's further streams: ``new`` with the magnitude of ``old``."""
    size = (old**2).mean(-1, keepdim=True) ** 0.5
    return new * size / (new**2).mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
