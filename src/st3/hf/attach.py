"""Puts a session on a model: which hooks, and what each reads of a call and writes back."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from st3.engine.calls import Chunk
from st3.engine.prefill import Prefill
from st3.engine.session import Session
from st3.errors import UnsupportedModelError
from st3.hf import call
from st3.hf.attention import (
    ATTRIBUTE,
    LayerHandle,
    attention_of,
    base_attention,
    on_unplanned_kernels,
    registered,
)
from st3.hf.cache import CacheSeam, new_cache
from st3.hf.compile import compiled_forward
from st3.hf.generation import checked_prefill, narrowed_deepstack, noticed_candidates
from st3.hf.hooks import Hooks
from st3.hf.layer_parts import listen_to_parts
from st3.models import Family, Parts
from st3.models.visual import visual_mask_for


class Attachment:
    """A session's hooks on a model.

    Passes run one at a time, from whatever thread they come: a second one waits for the first, so
    that answers are those that each thread gets alone.

    Args:
        visual_mask: [B, T] bool, which tokens are visual, for prompts whose model does not say.
        compile_decode: a mode of torch.compile or its keyword arguments; None not to compile.

    Attributes:
        lock: held while a pass runs.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        parts: Parts,
        session: Session,
        visual_mask: Tensor | None = None,
        compile_decode: str | dict[str, Any] | None = None,
    ) -> None:
        self.model, self.family, self.parts, self.session = model, family, parts, session
        self.visual_mask, self.compile_decode = visual_mask, compile_decode
        self.visual = family.visual_tokens(model, parts)
        self.latest_cache: weakref.ref[Any] | None = None
        self.lock = threading.RLock()
        self._tower: Any = None
        self._attention_mask: Any = None
        self._logits_to_keep: Any = 0
        self._checks_candidates = False

    def install(self, hooks: Hooks) -> None:
        """Put everything on the model; ``hooks`` takes it off again."""
        session, parts = self.session, self.parts
        if session.active or session.events.attends:
            self._install_layers(hooks)
        if session.active:
            self._install_generation(hooks)
        if hasattr(self.model, "_get_candidate_generator"):
            make = noticed_candidates(self.model._get_candidate_generator, self._expect_candidates)
            hooks.replace(self.model, "_get_candidate_generator", make)
        self.visual.listen(hooks)
        self._tower = self.family.tap(self.model, parts, session.plan.score, session.active)
        if self._tower is not None:
            self._tower.listen(hooks)
        for module, before in (
            (self.model, self._on_model),
            (parts.inner, self._on_inner),
            (parts.text, self._on_text),
        ):
            hooks.before(module, self._locked(before))
            hooks.replace(module, "forward", self._guarded(module.forward))
        hooks.after(parts.text, self._guarded(self._after_text))
        for module in (self.model, parts.inner, parts.text):
            hooks.always_after(module, self._unlock)

    # One thread at a time -----------------------------------------------------------------------

    def _locked(self, before: Callable[..., Any]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.lock.acquire()
            return self._guarded(before)(module, args, kwargs)

        return hook

    def _guarded(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, behind which the lock is free also if it was interrupted: torch calls hooks
        after an Exception, but not after a KeyboardInterrupt."""

        @functools.wraps(run)  # generate() reads the signature of forward
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except Exception:
                raise
            except BaseException:
                self._unlock()
                raise

        return guarded

    def _unlock(self, *call: Any) -> None:
        self.lock.release()

    # Hooks --------------------------------------------------------------------------------------

    def _install_layers(self, hooks: Hooks) -> None:
        text, softmax = self.parts.text, self.parts.softmax
        attention = attention_of(text.config)
        name = registered(attention)
        for index, module in softmax.items():
            handle = LayerHandle(index, base_attention(attention, module), self.session)
            hooks.replace(module, ATTRIBUTE, handle)
        for config in {id(m.config): m.config for m in (text, *softmax.values())}.values():
            hooks.assign(config, "_attn_implementation", name)
        for index, layer in enumerate(self.parts.layers):
            hooks.before(layer, self._layer_hook(index))
        listen_to_parts(hooks, self.parts.layers, self.session)

    def _install_generation(self, hooks: Hooks) -> None:
        text = self.parts.text
        if self.compile_decode is not None:
            forward = compiled_forward(text.forward, self.compile_decode, self.session)
            hooks.replace(text, "forward", forward)
        hooks.replace(text, "forward", on_unplanned_kernels(text.forward, self.session))
        if hasattr(self.model, "_prefill"):
            anneals = self.session.plan.schedule.drops
            hooks.replace(self.model, "_prefill", checked_prefill(self.model._prefill, anneals))
        if hasattr(text, "_deepstack_process"):
            process = narrowed_deepstack(text._deepstack_process, self.session)
            hooks.replace(text, "_deepstack_process", process)

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._logits_to_keep = call.arguments(module, args, kwargs).get("logits_to_keep", 0)

    def _on_inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = call.arguments(module, args, kwargs)
        self._attention_mask = given.get("attention_mask")
        self.visual.begin(given)

    def _on_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The text model is about to run: tell the session."""
        with self.session.events.span("begin"):
            return self._begin(module, args, kwargs)

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:  # a text model called by itself, on token ids
            self.session.abandon()
            return None
        cache = call.cache_in(kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        visual = self._visual_tokens(embeds, past)
        if visual is not None and self.session.active:
            if call.is_checkpointing(module) and not past:
                cache = None
            elif cache is None and call.wants_cache(module, kwargs):
                cache = new_cache(module.config)
                kwargs = call.with_cache(kwargs, cache)
        chunk = self._chunk(embeds, visual, cache, past)
        chunk.late = call.late_features(kwargs)
        self.session.begin(chunk)
        if isinstance(self.session.current, Prefill):
            kwargs = call.whole(kwargs, self.session.plan.wiring.shares)
        return args, kwargs

    def _chunk(self, embeds: Tensor, visual: Tensor | None, cache: Any, past: int) -> Chunk:
        seam = None
        if cache is not None:
            seam = CacheSeam(cache, self.session.plan.wiring.own, self._pads)
            if visual is None and not past and seam.stores:
                seam.renew(self.parts.text.config)
            if visual is not None:
                self.latest_cache = weakref.ref(cache)
                if self.session.active and not seam.stores:
                    seam.check()  # before the mask, which other caches bring along ready-made
        tower = self._tower.take if self._tower is not None else None
        return Chunk(
            embeds,
            attention_mask=self._mask_2d(visual is not None and self.session.active),
            visual=visual,
            sizes=self.visual.take_sizes() if visual is not None else (),
            grids=functools.partial(self._grids, self.visual.encoded),
            candidates=self._candidates(),
            cache=seam,
            past=past,
            tower=tower,
        )

    def _grids(self, encoded: Any, images: Any) -> Any:
        return self.family.image_grids(self.model, encoded, images)

    def _mask_2d(self, needed: bool = False) -> Tensor | None:
        """The 2D attention mask that the caller gave, or None; ``needed``: a ready-made 4D one, or
        several, cannot be trimmed."""
        mask = self._attention_mask
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
        if needed and mask is not None:
            raise UnsupportedModelError(
                "a ready-made 4D attention mask is not supported: pass the 2D attention_mask"
            )
        return None

    def _pads(self, past: int, rows: int) -> list[int]:
        """The padding of each row of an earlier turn."""
        mask = self._mask_2d()
        return [0] * rows if mask is None else (mask[:, :past] == 0).sum(1).tolist()

    def _expect_candidates(self) -> None:
        self._checks_candidates = True

    def _candidates(self) -> int:
        """The tokens behind the prompt that assisted decoding puts up for a check."""
        keep, checks = self._logits_to_keep, self._checks_candidates
        self._checks_candidates = False
        return keep - 1 if checks and isinstance(keep, int) and keep > 1 else 0

    def _layer_hook(self, index: int) -> Any:
        session, parts = self.session, self.parts

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            current = session.current
            if current is None or (call.is_unmasked(args, kwargs) and current.leaves(index)):
                return None
            with session.events.span("gather"):
                inputs, named = call.layer_inputs(module, args, kwargs, parts)
                current.enter(index, inputs)
                return call.layer_arguments(inputs, named, parts)

        return hook

    def _after_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # A later call of the text model by itself must not meet this prompt's visual tokens.
        self.visual.end()
        if self._tower is not None:
            self._tower.end()
        self._attention_mask = None
        # Gradient checkpointing runs layers again in backward: then the pass must still be there.
        with self.session.events.span("finish"):
            hidden = self.session.end(call.hidden_of(output), keep=torch.is_grad_enabled())
        return call.with_hidden(output, hidden)

    # Visual tokens ------------------------------------------------------------------------------

    def _visual_tokens(self, embeds: Tensor, past: int) -> Tensor | None:
        """[B, T] bool for the chunk under way, or None if it has no image."""
        if self.visual_mask is not None and past == 0:
            return visual_mask_for(self.visual_mask, embeds)
        # No image can come behind a prompt without image arguments: candidates copied from it
        # (prompt lookup) may be placeholders.
        if past and not self.visual.has_image:
            return None
        mask = self.visual.mask
        if mask is not None:
            return mask.to(embeds.device)
        if self.visual.has_image:
            raise UnsupportedModelError(
                f"{self.family.model_type}: the prompt has an image, but which of its tokens are "
                "visual was not found: pass visual_mask to st3.trim()"
            )
        if self.visual.unknown and self.session.active:
            warnings.warn(
                "st3 trims nothing: the prompt came as inputs_embeds without pixel_values, so that "
                "its visual tokens are unknown. Pass visual_mask to st3.trim()",
                stacklevel=2,
            )
        return None
