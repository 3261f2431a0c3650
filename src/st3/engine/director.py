"""Watches the forward passes of a model that a trimmer is attached to, and says what each one is:
a prompt to trim, text behind one, or nothing of ours."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from st3.cost import TextDims
from st3.engine.append import Append
from st3.engine.cache import TrimmedLayer
from st3.engine.clock import Clock, Phase
from st3.engine.columns import Block, Memo, Rows, first_block, memoised
from st3.engine.joined import JoinedAppend
from st3.engine.masks import Starts
from st3.engine.plan import Plan, Setup
from st3.engine.prefill import Prefill
from st3.engine.rows import JoinedLayer
from st3.engine.static import StaticAppend
from st3.errors import TrimStateError, UnsupportedModelError
from st3.hf.attention import LayerHandle
from st3.hf.call import CACHE, cache_in
from st3.hf.hooks import Hooks
from st3.models.tower import ClassAttentionTap
from st3.report import Report

Pass = Prefill | Append | JoinedAppend | StaticAppend

PADDED_CONTINUATION = (
    "padding inside a continued conversation is not supported: continue the rows one by one, or "
    "start again from the whole conversation"
)


class Director:
    """The hooks of one trimmer, in the order in which a forward pass meets them: ``on_model``,
    ``on_inner``, ``on_text``, one ``layer_hook`` each, ``after_text``."""

    plan: Plan

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.visual = setup.family.visual_tokens(setup.model, setup.parts)
        self.tower: ClassAttentionTap | None = None
        self.handles: tuple[LayerHandle, ...] = ()
        self.report: Report | None = None
        self.current: Pass | None = None
        self._static: StaticAppend | None = None
        self._known: dict[Starts, Tensor] = {}
        self._names: Memo = {}  # of what a module's forward takes
        self._attention_mask: Any = None
        self._chunk_mask: Tensor | None = None
        self._tower_weights: Tensor | None = None
        self._logits_to_keep: Any = 0
        self._cache: weakref.ref[Cache] | None = None

    def listen(self, hooks: Hooks) -> None:
        """Start to listen to the model's parts for what a prompt shows before the decoder."""
        self.visual.listen(hooks)
        if self.setup.touches and "tower" in self.plan.needs:
            self.tower = self.setup.family.class_attention(self.setup.model, self.setup.parts)
            self.tower.listen(hooks)

    def release(self) -> None:
        """Let go of the model."""
        self.tower = None
        self._set_pass(None)
        self._static = None
        self._known.clear()
        self._names.clear()
        self.handles = ()
        self.visual.end()

    def compact(self) -> int:
        """Compact the latest cache; the bytes freed."""
        layers = trimmed_layers(self._cache() if self._cache is not None else None)
        before = sum(layer.footprint()[1] for layer in layers)
        for layer in layers:
            layer.compact()
        if layers and self.report is not None:
            self.report.sample(layers)
        return before - sum(layer.footprint()[1] for layer in layers)

    def on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._logits_to_keep = self._by_name(module, args, kwargs).get("logits_to_keep", 0)

    def on_inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._by_name(module, args, kwargs)
        self._attention_mask = given.get("attention_mask")
        self.visual.begin(given)

    def _by_name(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """All arguments of a forward call; some families hand the token ids on by position."""
        if not args:
            return kwargs
        names: Any = memoised(
            self._names, module, lambda: tuple(inspect.signature(module.forward).parameters)
        )
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def on_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The text model is about to run: decide what kind of pass this is."""
        self._set_pass(None)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None  # a text model called by itself, on token ids
        cache = cache_in(kwargs)
        past = cache.get_seq_length() if cache is not None else 0
        layers = trimmed_layers(cache) if past else []
        # Candidates copied from the prompt (prompt lookup) may be placeholders without an image.
        prompt = None if past and not self.visual.has_image else self._prompt(embeds, cache)
        if not self.setup.touches:
            if prompt is not None:
                self._begin_report(prompt[0], embeds, None, past)
            elif self.report is not None and cache is not None and past:
                self.report.advance(embeds.shape[1], cache)
            return None
        if prompt is not None:
            return args, self._begin_prefill(module, prompt, cache, past, embeds, kwargs)
        if layers:
            self._begin_append(layers, embeds)
        return None

    def _visual_tokens(self, embeds: Tensor) -> Tensor | None:
        """[B, T] bool for the chunk under way, or None if it has no image."""
        mask = self.visual.mask
        given = self.setup.visual_mask
        if mask is None and given is not None and given.shape == embeds.shape[:2]:
            mask = given
        if mask is not None:
            return mask.to(embeds.device)
        if self.visual.has_image:
            raise UnsupportedModelError(
                f"{self.setup.family.model_type}: the prompt has an image, but which of its "
                "tokens are visual was not found: pass visual_mask to st3.trim()"
            )
        if self.visual.unknown:
            warnings.warn(
                "st3 trims nothing: the prompt came as inputs_embeds without pixel_values, so that "
                "its visual tokens are unknown. Pass visual_mask to st3.trim()",
                stacklevel=2,
            )
        return None

    def _prompt(self, embeds: Tensor, cache: Cache | None) -> tuple[Rows, Block] | None:
        """Read the chunk's rows; None if it holds no visual token."""
        visual = self._visual_tokens(embeds)
        if visual is None:
            return None
        mask = self._attention_mask
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise UnsupportedModelError(
                "a ready-made 4D attention mask is not supported: pass the 2D attention_mask"
            )
        columns = embeds.shape[1]
        if mask is not None:
            mask = mask[:, -columns:].to(embeds.device)
        keep = self._logits_to_keep
        # generate(), which passes its own cache, asks for the last position alone; more than one,
        # for a single row, is how assisted decoding checks candidates that stand behind the prompt.
        checks = isinstance(keep, int) and keep > 1 and embeds.shape[0] == 1 and cache is not None
        tail = keep - 1 if checks else 0
        rows, block = first_block(
            visual, mask, min(tail, columns - 1), self.setup.per_image, self.visual.take_sizes()
        )
        self._chunk_mask = mask if block.valid is not None else None
        if not any(rows.n_visual):
            return None
        if self.tower is not None:
            self._tower_weights = self.tower.take(visual)
        return rows, block

    def _begin_prefill(
        self,
        text: nn.Module,
        prepared: tuple[Rows, Block],
        cache: Cache | None,
        past: int,
        embeds: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        rows, block = prepared
        if self.report is not None:
            self.report.freeze()
        if past and block.valid is not None:
            raise TrimStateError(PADDED_CONTINUATION)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(text.config, "use_cache", False)
        checkpointing = getattr(text, "gradient_checkpointing", False) and text.training
        if checkpointing and not past:
            cache = None  # the layers leave aside whatever cache they are given
        elif cache is None and use_cache:
            cache = DynamicCache(config=text.config)
            kwargs = {**kwargs, CACHE: cache}
        clock, layers = Clock(), None
        if cache is not None:
            layers = self._own_layers(cache, past)
            clock = layers[0].clock
            self._cache = weakref.ref(cache)
        clock.phase = Phase.APPEND if past else Phase.PREFILL
        clock.start, clock.tokens = past, rows.length
        if past:
            _settle(layers or ())
        else:
            clock.prompt = rows.length - rows.tail
        clock.dense_from = past + rows.length - rows.tail
        current = Prefill(
            self.plan, rows, block, self._chunk_mask, layers, clock, past > 0, self._tower_weights
        )
        self._tower_weights = None
        self._set_pass(current)
        self._begin_report(rows, embeds, current, past)
        return kwargs

    @cached_property
    def _dims(self) -> TextDims | None:
        try:
            return TextDims.from_config(self.setup.model.config)
        except ValueError:  # a family that the cost model does not describe
            return None

    def _begin_report(self, rows: Rows, embeds: Tensor, prefill: Prefill | None, past: int) -> None:
        mask = self._attention_mask if past else None
        n_past = mask[:, :past].sum(1).tolist() if mask is not None else [past] * rows.batch
        self.report = Report.begin(
            self.setup.policy,
            self.setup.schedule,
            rows,
            self.plan.budgets(rows),
            self._dims,
            embeds.dtype,
            prefill,
            n_past,
            past,
        )

    def _begin_append(self, layers: list[TrimmedLayer], embeds: Tensor) -> None:
        clock = layers[0].clock
        clock.phase, clock.start, clock.tokens = Phase.APPEND, layers[0].length, embeds.shape[1]
        joined = [layer for layer in layers if isinstance(layer, JoinedLayer)]
        mask = self._attention_mask
        # A single token is never padding: no need to look.
        several = embeds.shape[1] > 1 and not joined
        if several and isinstance(mask, Tensor) and not bool(mask[:, -embeds.shape[1] :].all()):
            raise TrimStateError(PADDED_CONTINUATION)
        _settle(layers)
        if joined:
            self._set_pass(JoinedAppend(self.plan, joined, clock))
            return
        if self.setup.compile_decode and embeds.shape[1] == 1:
            if self._static is None or self._static.clock is not clock:
                self._static = StaticAppend(self.plan, layers, clock, self.setup.decode_bucket)
            self._static.prepare()
            self._set_pass(self._static)
            return
        self._set_pass(Append(self.plan, layers, clock, self._known))

    def _own_layers(self, cache: Cache, past: int) -> list[TrimmedLayer]:
        """Put trimmed layers into generate()'s own cache, in place."""
        layers = trimmed_layers(cache)
        if layers and past:
            return layers
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            raise UnsupportedModelError(
                f"{type(cache).__name__} is not supported: leave cache_implementation unset, so "
                "that generate() makes a DynamicCache"
            )
        clock = Clock()
        count = len(self.setup.parts.layers)
        fresh = [
            TrimmedLayer(
                i,
                self.setup.schedule,
                clock,
                self.setup.parts.windows[i],
                recalls=self.plan.recalls,
                forgets=not self.plan.rerank,
            )
            for i in range(count)
        ]
        for i, old in enumerate(cache.layers[:count]):
            # One of ours was reset, and may stem from another policy.
            if type(old) not in (DynamicLayer, DynamicSlidingWindowLayer, TrimmedLayer):
                raise UnsupportedModelError(
                    f"a cache layer of type {type(old).__name__} cannot be trimmed: leave "
                    "cache_implementation unset"
                )
            if past:
                _adopt(fresh[i], old, past, self._attention_mask)
        cache.layers[:count] = fresh
        return fresh

    def layer_hook(self, index: int) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            current = self.current
            if current is None:
                return None
            if args:
                return current.enter(index, args[0], args[1:], kwargs), kwargs
            (kwargs["hidden_states"],) = current.enter(index, kwargs["hidden_states"], (), kwargs)
            return (), kwargs

        return hook

    def forward(
        self, original: Callable[..., Any], compiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The text model's forward: compiled for decode steps, as it is for everything else."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(self.current, StaticAppend):
                return original(*args, **kwargs)
            if kwargs.get("position_ids") is None:
                rows = kwargs["inputs_embeds"].shape[0]
                kwargs["position_ids"] = self.current.position.expand(rows, 1)
            output = compiled(**kwargs)
            self.current.done()
            return output

        return forward

    def deepstack(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """DeepStack (Qwen3-VL) adds image features to the first layers' outputs: give it the
        features of the tokens that are still there."""

        def process(hidden: Tensor, visual_mask: Tensor, features: Tensor) -> Tensor:
            current = self.current
            if isinstance(current, Prefill) and current.block.index is not None:
                block, index = current.block, current.block.source_columns()
                visual_mask, features = visual_mask.to(index.device), features.to(index.device)
                number = (torch.cumsum(visual_mask.flatten(), 0) - 1).view_as(visual_mask)
                visual_mask = visual_mask.gather(1, index)
                if block.valid is not None:
                    visual_mask = visual_mask & block.valid
                features = features[number.gather(1, index)[visual_mask]]
            return original(hidden, visual_mask, features)

        return process

    def after_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        current = self.current
        if current is None:
            return None
        if isinstance(output, tuple):
            output = (current.finish(output[0]), *output[1:])
        else:
            output.last_hidden_state = current.finish(output.last_hidden_state)
        if isinstance(current, Prefill) and current.cache is not None and not current.extends:
            missing = [i for i in range(len(current.cache)) if i not in current.attended]
            if missing:
                raise UnsupportedModelError(
                    f"decoder layers {missing} did not call their attention through transformers' "
                    "attention interface"
                )
        current.clock.phase = Phase.IDLE
        if self.report is not None:
            self.report.close_prefill()
            if current.cache is not None:
                self.report.sample(current.cache)
        # Gradient checkpointing runs layers again in backward: then the pass must still be there.
        if not torch.is_grad_enabled():
            self._set_pass(None)
        return output

    def _set_pass(self, current: Pass | None) -> None:
        self.current = current
        for handle in self.handles:
            handle.current = current


def _settle(layers: Iterable[TrimmedLayer]) -> None:
    for layer in layers:
        layer.settle()


def trimmed_layers(cache: Cache | None) -> list[TrimmedLayer]:
    """The layers of a cache that are st3's."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, TrimmedLayer)]


def _adopt(layer: TrimmedLayer, old: Any, past: int, attention_mask: Tensor | None) -> None:
    """Take over a plain cache layer that holds an earlier, text-only turn."""
    keys, values = old.keys, old.values
    batch, columns = keys.shape[0], keys.shape[2]
    pads = [0] * batch
    if attention_mask is not None:
        pads = (attention_mask[:, :past] == 0).sum(1).tolist()
    hidden_by_window = past - columns
    counts = [columns - max(0, pad - hidden_by_window) for pad in pads]
    positions = torch.arange(past - columns, past, device=keys.device).expand(batch, columns)
    layer.clock.start, layer.clock.tokens, layer.clock.prompt = 0, past, past
    layer.clock.phase = Phase.PREFILL
    layer.update(keys, values)
    layer.store(lambda: None, positions, counts, [0] * batch, [()] * batch, columns)
