"""Attach a policy to an unmodified transformers model, and take it back without a trace."""

from __future__ import annotations

import warnings
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from st3.engine.attention import ATTRIBUTE, LayerHandle, base_attention, registered
from st3.engine.cache import Clock, Phase, TrimmedLayer
from st3.engine.columns import Block, Rows, first_block
from st3.engine.errors import TrimStateError, UnsupportedModelError
from st3.engine.families import VisualTokens, family_of, parts_of
from st3.engine.masks import kind_of
from st3.engine.passes import Append, Plan, Prefill
from st3.policies import Policy, parse
from st3.report import Report

MODEL_ATTRIBUTE = "_st3_trimmer"


class Trimmer:
    """A policy attached to a model: a context manager, or :meth:`attach` and :meth:`detach`.

    Made by :func:`st3.trim`, which documents the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: str | Policy = "st3",
        *,
        per_image: bool = False,
        own_cache: bool = False,
        visual_mask: Tensor | None = None,
        untested: bool = False,
        **options: Any,
    ) -> None:
        self.model = model
        self.policy = parse(policy, **options)
        self.per_image = per_image
        self.own_cache = own_cache
        self.visual_mask = visual_mask
        self.family = family_of(model, untested)
        self.parts = parts_of(model)
        if per_image and self.policy.rerank:
            raise ValueError(
                "per_image=True and rerank_every exclude each other: a new ranking does not know "
                "the images' own budgets"
            )
        self.schedule = self.policy.schedule(len(self.parts.layers))
        self._visual = VisualTokens(model, self.parts.inner)
        self._hooks: list[Any] = []
        self._handles: tuple[LayerHandle, ...] = ()
        self._attention_names: list[tuple[Any, str]] = []
        self._outer: Trimmer | None = None
        self._pass: Prefill | Append | None = None
        self._attention_mask: Tensor | None = None
        self._logits_to_keep: Any = 0
        self._report: Report | None = None
        self._cache: weakref.ref[Cache] | None = None

    # Life cycle -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    @property
    def touches(self) -> bool:
        """Whether anything of a pass is changed; a policy that drops nothing only watches."""
        return self.schedule.drops or self.own_cache

    def attach(self) -> Trimmer:
        """Start trimming. On a model that is trimmed already, this trimmer takes over until it is
        detached.

        Raises:
            TrimStateError: if this very trimmer is attached already.
            UnsupportedModelError: if the model's present settings cannot be trimmed.
        """
        if self.attached:
            raise TrimStateError("this trimmer is attached already: detach() it first")
        outer: Trimmer | None = self.model.__dict__.get(MODEL_ATTRIBUTE)
        if outer is not None:
            outer._unhook()
        try:
            self._hook()
        except Exception:
            self._unhook()
            if outer is not None:
                outer._hook()
            raise
        self._outer = outer
        self.model.__dict__[MODEL_ATTRIBUTE] = self
        return self

    def detach(self) -> None:
        """Stop trimming and leave nothing behind on the model. Does nothing if not attached.

        Raises:
            TrimStateError: if another trimmer was attached on top and is still there.
        """
        current = self.model.__dict__.get(MODEL_ATTRIBUTE)
        if current is not self:
            if self._is_below(current):
                raise TrimStateError("another trimmer is attached on top of this one: detach it first")
            return
        self._unhook()
        del self.model.__dict__[MODEL_ATTRIBUTE]
        if self._outer is not None:
            self._outer._hook()
            self.model.__dict__[MODEL_ATTRIBUTE] = self._outer
            self._outer = None

    def _is_below(self, other: Trimmer | None) -> bool:
        while other is not None:
            if other is self:
                return True
            other = other._outer
        return False

    def __enter__(self) -> Trimmer:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _hook(self) -> None:
        text, inner = self.parts.text, self.parts.inner
        attention = text.config._attn_implementation or "eager"
        if self.touches:
            self._check_settings(attention)
        if self.touches:
            name = registered(attention)
            self._handles = tuple(
                LayerHandle(i, base_attention(attention, module))
                for i, module in enumerate(self.parts.attentions)
            )
            for module, handle in zip(self.parts.attentions, self._handles, strict=True):
                module.__dict__[ATTRIBUTE] = handle
            configs = {id(m.config): m.config for m in (text, *self.parts.attentions)}
            for config in configs.values():
                self._attention_names.append((config, config._attn_implementation))
                config._attn_implementation = name
            for index, layer in enumerate(self.parts.layers):
                self._hooks.append(
                    layer.register_forward_pre_hook(self._layer_hook(index), with_kwargs=True)
                )
            if hasattr(text, "_deepstack_process"):
                self._wrap_deepstack(text)
        self._hooks.append(self.model.register_forward_pre_hook(self._on_model, with_kwargs=True))
        self._hooks.append(inner.register_forward_pre_hook(self._on_inner, with_kwargs=True))
        self._hooks.append(text.register_forward_pre_hook(self._on_text, with_kwargs=True))
        self._hooks.append(text.register_forward_hook(self._after_text, with_kwargs=True))
        self._visual.attach()
        self._plan = Plan(
            schedule=self.schedule,
            score=self.policy.score,
            rerank=self.policy.rerank,
            kind=kind_of(attention),
            windows=self.parts.windows,
            per_image=self.per_image,
        )

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for config, name in self._attention_names:
            config._attn_implementation = name
        self._attention_names.clear()
        for module in self.parts.attentions:
            module.__dict__.pop(ATTRIBUTE, None)
        self._handles = ()
        self.parts.text.__dict__.pop("_deepstack_process", None)
        self._visual.detach()
        self._pass = None

    def _check_settings(self, attention: str) -> None:
        generation = getattr(self.model, "generation_config", None)
        if getattr(generation, "prefill_chunk_size", None) is not None:
            raise UnsupportedModelError(
                "chunked prefill is not supported: a chunk does not see the prompt's last token. "
                "Set generation_config.prefill_chunk_size to None"
            )
        if "flash" in attention and any(self.parts.windows):
            raise UnsupportedModelError(
                "flash attention counts a sliding window in stored tokens, which trimming shifts: "
                "load this model with attn_implementation='sdpa'"
            )

    # Hooks ------------------------------------------------------------------------------------

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._logits_to_keep = kwargs.get("logits_to_keep", 0)

    def _on_inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._attention_mask = kwargs.get("attention_mask")
        self._visual.begin(kwargs)

    def _on_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._set_pass(None)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None  # plain text: families without an image pass input_ids on
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        visual = self._visual_tokens(embeds)
        trimmed = _trimmed_layers(cache)
        if visual is None and not (past and trimmed):
            if trimmed:
                raise TrimStateError("an emptied trimmed cache was passed: pass a new DynamicCache")
            return None
        if visual is not None:
            prepared = self._prompt(embeds, visual, past)
            if prepared is None:
                visual = None
                if not (past and trimmed):
                    return None
        if not self.touches:
            if visual is not None:
                self._begin_report(prepared[0], embeds)
            elif self._report is not None:
                self._report.advance(embeds.shape[1])
            return None
        if visual is None:
            self._begin_append(trimmed, embeds)
            return None
        kwargs = self._begin_prefill(module, prepared, cache, past, embeds, kwargs)
        return args, kwargs

    def _visual_tokens(self, embeds: Tensor) -> Tensor | None:
        """[B, T] bool for the chunk under way, or None if it has no image."""
        mask = self._visual.mask
        if mask is None and self.visual_mask is not None:
            if self.visual_mask.shape == embeds.shape[:2]:
                mask = self.visual_mask
        if mask is not None:
            return mask.to(embeds.device)
        if self._visual.has_image:
            raise UnsupportedModelError(
                f"{self.family.model_type}: the prompt has an image, but which of its tokens are "
                "visual was not found: pass visual_mask to st3.trim()"
            )
        if self._visual.unknown:
            warnings.warn(
                "st3 trims nothing: the prompt came as inputs_embeds without pixel_values, so that "
                "its visual tokens are unknown. Pass visual_mask to st3.trim()",
                stacklevel=2,
            )
        return None

    def _prompt(self, embeds: Tensor, visual: Tensor, past: int) -> tuple[Rows, Block] | None:
        """Read the chunk's rows; None if it turns out to hold no visual token."""
        mask = self._attention_mask
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise UnsupportedModelError(
                "a ready-made 4D attention mask is not supported: pass the 2D attention_mask"
            )
        columns = embeds.shape[1]
        if mask is not None:
            mask = mask[:, -columns:].to(embeds.device)
        keep = self._logits_to_keep
        # generate() asks for the last position alone; more than one, for a single row, is how
        # assisted decoding checks candidates that stand behind the prompt.
        tail = keep - 1 if isinstance(keep, int) and keep > 1 and embeds.shape[0] == 1 else 0
        rows, block = first_block(visual, mask, min(tail, columns - 1), self.per_image)
        self._chunk_mask = mask if block.valid is not None else None
        return (rows, block) if any(rows.n_visual) else None

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
        if past and block.valid is not None:
            raise TrimStateError(
                "padding inside a continued conversation is not supported: continue the rows one by "
                "one, or start again from the whole conversation"
            )
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(text.config, "use_cache", False)
        checkpointing = getattr(text, "gradient_checkpointing", False) and text.training
        if cache is None and use_cache and not checkpointing:
            cache = DynamicCache(config=text.config)
            kwargs = {**kwargs, "past_key_values": cache}
        clock, layers = Clock(), None
        if cache is not None:
            layers = self._own_layers(cache, past)
            clock = layers[0].clock
            self._cache = weakref.ref(cache)
        clock.phase = Phase.APPEND if past else Phase.PREFILL
        clock.start, clock.tokens = past, rows.length
        if not past:
            clock.prompt = rows.length - rows.tail
        clock.dense_from = past + rows.length - rows.tail
        current = Prefill(
            self._plan, rows, block, self._chunk_mask, layers, clock, extends=past > 0
        )
        self._set_pass(current)
        self._begin_report(rows, embeds, current)
        return kwargs

    def _begin_report(self, rows: Rows, embeds: Tensor, prefill: Prefill | None = None) -> None:
        self._report = Report.begin(
            str(self.policy),
            self.schedule,
            rows,
            self._plan.budgets(rows),
            self.model.config,
            embeds.dtype,
            prefill,
        )

    def _begin_append(self, layers: list[TrimmedLayer], embeds: Tensor) -> None:
        clock = layers[0].clock
        clock.phase, clock.start, clock.tokens = Phase.APPEND, layers[0].length, embeds.shape[1]
        mask = self._attention_mask
        if embeds.shape[1] > 1 and isinstance(mask, Tensor) and mask.dim() == 2:
            if not bool(mask[:, -embeds.shape[1] :].all()):
                raise TrimStateError(
                    "padding inside a continued conversation is not supported: continue the rows "
                    "one by one, or start again from the whole conversation"
                )
        self._set_pass(Append(self._plan, layers, clock))

    def _own_layers(self, cache: Cache, past: int) -> list[TrimmedLayer]:
        """Put trimmed layers into generate()'s own cache, in place."""
        layers = _trimmed_layers(cache)
        if layers:
            if not past:
                for layer in layers:
                    layer.reset()
            return layers
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            raise UnsupportedModelError(
                f"{type(cache).__name__} is not supported: leave cache_implementation unset, so that "
                "generate() makes a DynamicCache"
            )
        clock = Clock()
        count = len(self.parts.layers)
        fresh = [
            TrimmedLayer(i, self.schedule, clock, self.parts.windows[i]) for i in range(count)
        ]
        for i, old in enumerate(cache.layers[:count]):
            if type(old) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise UnsupportedModelError(
                    f"a cache layer of type {type(old).__name__} cannot be trimmed"
                )
            if past:
                _adopt(fresh[i], old, past, self._attention_mask)
        cache.layers[:count] = fresh
        return fresh

    def _layer_hook(self, index: int) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            current = self._pass
            if current is None:
                return None
            if args:
                return current.enter(index, args[0], args[1:], kwargs), kwargs
            (kwargs["hidden_states"],) = current.enter(index, kwargs["hidden_states"], (), kwargs)
            return (), kwargs

        return hook

    def _wrap_deepstack(self, text: nn.Module) -> None:
        """DeepStack (Qwen3-VL) adds image features to the first layers' outputs: give it the
        features of the tokens that are still there."""
        original = text._deepstack_process

        def deepstack(hidden: Tensor, visual_mask: Tensor, features: Tensor) -> Tensor:
            current = self._pass
            if isinstance(current, Prefill) and current.block.index is not None:
                block = current.block
                number = (torch.cumsum(visual_mask.flatten(), 0) - 1).view_as(visual_mask)
                visual_mask = visual_mask.gather(1, block.index)
                if block.valid is not None:
                    visual_mask = visual_mask & block.valid
                features = features[number.gather(1, block.index)[visual_mask]]
            return original(hidden, visual_mask, features)  # type: ignore[no-any-return]

        text.__dict__["_deepstack_process"] = deepstack

    def _after_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        current = self._pass
        if current is None:
            return None
        if isinstance(output, tuple):
            output = (current.finish(output[0]), *output[1:])
        else:
            output.last_hidden_state = current.finish(output.last_hidden_state)
        if isinstance(current, Prefill) and current.cache is not None and not current.extends:
            missing = [i for i in range(len(current.cache)) if i not in current.stored]
            if missing:
                raise UnsupportedModelError(
                    f"decoder layers {missing} did not call their attention through transformers' "
                    "attention interface"
                )
        current.clock.phase = Phase.IDLE
        if self._report is not None:
            self._report.close_prefill()
            if current.cache is not None:
                self._report.sample(current.cache, current.clock.steps)
        # Gradient checkpointing runs layers again in backward: then the pass must still be there.
        if not torch.is_grad_enabled():
            self._set_pass(None)
        return output

    def _set_pass(self, current: Prefill | Append | None) -> None:
        self._pass = current
        for handle in self._handles:
            handle.current = current

    # Results ----------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """The :class:`~st3.Report` of the latest generate() or forward() with an image.

        Raises:
            TrimStateError: if there was none yet.
        """
        if self._report is None:
            raise TrimStateError("nothing to report yet: run the model on a prompt with an image")
        return self._report

    def compact(self) -> int:
        """Free the KV entries that annealing has released, of the latest cache.

        Returns:
            the bytes freed.
        """
        cache = self._cache() if self._cache is not None else None
        layers = _trimmed_layers(cache)
        before = sum(layer.allocated_tokens * layer.bytes_per_token for layer in layers)
        for layer in layers:
            layer.compact()
        if layers and self._report is not None:
            self._report.sample(layers, self._report.steps)
        return before - sum(layer.allocated_tokens * layer.bytes_per_token for layer in layers)


def _trimmed_layers(cache: Cache | None) -> list[TrimmedLayer]:
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
    layer.store(None, positions, counts, [0] * batch, [()] * batch)


def trim(
    model: nn.Module,
    policy: str | Policy = "st3",
    *,
    per_image: bool = False,
    own_cache: bool = False,
    visual_mask: Tensor | None = None,
    untested: bool = False,
    **options: Any,
) -> Trimmer:
    """Trim the visual tokens of a transformers vision-language model while in the ``with`` block.

    Args:
        model: any supported ``AutoModelForImageTextToText``; it is not modified.
        policy: an st3 policy, or a string such as ``"st3"`` or ``"fastv:layer=2,drop=0.5"``.
        per_image: give each image of a prompt the policy's share of its own tokens, in place of
            one budget for all of a prompt's images.
        own_cache: use st3's preallocated cache also if the policy drops nothing.
        visual_mask: [B, T] bool, which tokens are visual, for prompts passed as ready-made
            ``inputs_embeds`` without ``pixel_values``.
        untested: try a family that st3 has no tests for.
        options: further arguments of the policy, e.g. ``trim(model, "st3", final_keep=0.01)``.

    Raises:
        ValueError: unknown policy or argument, or one that does not fit the model's layers.
        UnsupportedModelError: a model, attention kernel or cache that cannot be trimmed.
    """
    return Trimmer(
        model,
        policy,
        per_image=per_image,
        own_cache=own_cache,
        visual_mask=visual_mask,
        untested=untested,
        **options,
    )
