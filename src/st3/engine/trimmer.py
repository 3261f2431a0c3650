"""Attach a policy to an unmodified transformers model, and take it back without a trace."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from st3.engine import static
from st3.engine.director import Director
from st3.engine.masks import kind_of
from st3.engine.parallel import head_group
from st3.engine.plan import Plan, Setup
from st3.errors import TrimStateError, UnsupportedModelError
from st3.hf.attention import ATTRIBUTE, LayerHandle, base_attention, registered
from st3.hf.hooks import Hooks
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import Policy, parse
from st3.methods.scores import needs_of, stage_of
from st3.models.families import family_of
from st3.report import Report

MODEL_ATTRIBUTE = "_st3_trimmer"


class Trimmer:
    """A policy attached to a model: a context manager, or :meth:`attach` and :meth:`detach`.

    Made by :func:`st3.trim`, which documents the arguments.

    Attributes:
        policy, schedule: what is dropped.
        family, parts: what it is dropped from.
        touches: whether anything of a pass is changed; a policy that drops nothing only watches.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: str | Policy = DEFAULT_POLICY,
        *,
        per_image: bool = False,
        own_cache: bool = False,
        visual_mask: Tensor | None = None,
        untested: bool = False,
        compile_decode: str | dict[str, Any] | None = None,
        decode_bucket: int = 256,
        **options: Any,
    ) -> None:
        self.model = model
        self.policy = parse(policy, **options)
        self.per_image = per_image
        self.compile_decode = compile_decode
        self.family = family_of(model, untested)
        self.parts = self.family.parts(model)
        if per_image and self.policy.rerank:
            raise ValueError(
                "per_image=True and rerank_every exclude each other: a new ranking does not know "
                "the images' own budgets"
            )
        self.schedule = self.policy.schedule(len(self.parts.layers))
        score = self.policy.scorer()
        if self.schedule.prunes(0) and stage_of(score) != "embeds":
            raise ValueError(
                f"policy {self.policy} drops tokens before decoder layer 0, where nothing has "
                "ranked them yet: let its schedule keep all of them in layer 0, or rank by a score "
                "of the embeddings, such as divprune"
            )
        self.touches = self.schedule.drops or own_cache
        self._director = Director(
            Setup(
                model=model,
                parts=self.parts,
                family=self.family,
                policy=str(self.policy),
                schedule=self.schedule,
                touches=self.touches,
                per_image=per_image,
                visual_mask=visual_mask,
                compile_decode=compile_decode,
                decode_bucket=decode_bucket,
            )
        )
        self._hooks = Hooks()
        self._outer: Trimmer | None = None

    # Life cycle -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def attach(self) -> Trimmer:
        """Start trimming. On a model that is trimmed already, this trimmer takes over until it is
        detached.

        Raises:
            TrimStateError: if this very trimmer is attached already.
            UnsupportedModelError: if the model's present settings cannot be trimmed.
        """
        outer: Trimmer | None = self.model.__dict__.get(MODEL_ATTRIBUTE)
        if self._is_below(outer):
            raise TrimStateError("this trimmer is attached already: detach() it first")
        if outer is not None:
            outer._unhook()
        try:
            if self.touches:
                self._check_settings(self._attention())
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
                raise TrimStateError(
                    "another trimmer is attached on top of this one: detach it first"
                )
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

    def _attention(self) -> str:
        return self.parts.text.config._attn_implementation or "eager"

    def _hook(self) -> None:
        text, inner, director = self.parts.text, self.parts.inner, self._director
        attention = self._attention()
        score = self.policy.scorer()
        rotary = self.touches and "rotary" in needs_of(score)
        director.plan = Plan(
            schedule=self.schedule,
            score=score,
            rerank=self.policy.rerank,
            recalls=self.policy.recalls,
            unrotate=self.family.inverse_rotation(self.parts) if rotary else None,
            kind=kind_of(attention),
            windows=self.parts.windows,
            per_image=self.per_image,
            ranks=head_group(self.parts.attentions[0]),
        )
        if self.touches:
            self._hook_layers(attention)
        for module, hook in (
            (self.model, director.on_model),
            (inner, director.on_inner),
            (text, director.on_text),
        ):
            self._hooks.before(module, hook)
        self._hooks.after(text, director.after_text)
        director.listen(self._hooks)

    def _hook_layers(self, attention: str) -> None:
        text, director = self.parts.text, self._director
        name = registered(attention)
        handles = [
            LayerHandle(i, base_attention(attention, module))
            for i, module in enumerate(self.parts.attentions)
        ]
        for module, handle in zip(self.parts.attentions, handles, strict=True):
            self._hooks.replace(module, ATTRIBUTE, handle)
        director.handles = tuple(handles)
        configs = {id(m.config): m.config for m in (text, *self.parts.attentions)}
        for config in configs.values():
            self._hooks.assign(config, "_attn_implementation", name)
        for index, layer in enumerate(self.parts.layers):
            self._hooks.before(layer, director.layer_hook(index))
        if self.compile_decode:
            static.check(director.plan)
            compiled = static.compile_text(text.forward, self.compile_decode)
            self._hooks.replace(text, "forward", director.forward(text.forward, compiled))
        prefill: Any = getattr(self.model, "_prefill", None)
        if prefill is not None:
            self._hooks.replace(self.model, "_prefill", _whole(prefill))
        if hasattr(text, "_deepstack_process"):
            process = director.deepstack(text._deepstack_process)
            self._hooks.replace(text, "_deepstack_process", process)

    def _unhook(self) -> None:
        self._hooks.restore()
        self._director.release()

    def _check_settings(self, attention: str) -> None:
        _check_whole(getattr(self.model, "generation_config", None))
        if "flash" in attention and any(self.parts.windows):
            raise UnsupportedModelError(
                "flash attention counts a sliding window in stored tokens, which trimming shifts: "
                "load this model with attn_implementation='sdpa'"
            )

    # Results ----------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """The :class:`~st3.Report` of the latest generate() or forward() with an image.

        Raises:
            TrimStateError: if there was none yet.
        """
        if self._director.report is None:
            raise TrimStateError("nothing to report yet: run the model on a prompt with an image")
        return self._director.report

    def compact(self) -> int:
        """Free the KV entries that annealing has released, of the latest cache.

        Returns:
            the bytes freed.
        """
        return self._director.compact()


def _check_whole(generation_config: Any) -> None:
    if getattr(generation_config, "prefill_chunk_size", None) is not None:
        raise UnsupportedModelError(
            "chunked prefill is not supported: a chunk does not see the prompt's last token. "
            "Set prefill_chunk_size to None, also in the model's generation_config"
        )


def _whole(prefill: Callable[..., Any]) -> Callable[..., Any]:
    """generate()'s prefill, which is told only there that prompts shall come in chunks."""

    def checked(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        _check_whole(generation_config)
        return prefill(input_ids, generation_config, *args, **kwargs)

    return checked


def trim(
    model: nn.Module,
    policy: str | Policy = DEFAULT_POLICY,
    *,
    per_image: bool = False,
    own_cache: bool = False,
    visual_mask: Tensor | None = None,
    untested: bool = False,
    compile_decode: str | dict[str, Any] | None = None,
    decode_bucket: int = 256,
    **options: Any,
) -> Trimmer:
    """Trim the visual tokens of a transformers vision-language model while in the ``with`` block.

    Args:
        model: any supported ``AutoModelForImageTextToText``; it is not modified.
        policy: an st3 policy, or a string such as ``"st3-7b"`` or ``"fastv:layer=2,drop=0.5"``.
        per_image: give each image of a prompt the policy's share of its own tokens, in place of
            one budget for all of a prompt's images.
        own_cache: use st3's preallocated cache also if the policy drops nothing.
        visual_mask: [B, T] bool, which tokens are visual, for prompts passed as ready-made
            ``inputs_embeds`` without ``pixel_values``.
        untested: try a family that st3 has no tests for.
        compile_decode: a mode of torch.compile ("default", or "reduce-overhead" for CUDA graphs),
            or a dict of its keyword arguments, to run decode steps as one graph over buffers of
            fixed size; None runs them as they are. It pays where decoding is bound by kernel
            launches.
        decode_bucket: tokens to which the size of those buffers is rounded up.
        options: further arguments of the policy, e.g. ``trim(model, "st3", tau=64)``,
            or ``budget=0.35``, the mean share of the visual tokens over the layers.

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
        compile_decode=compile_decode,
        decode_bucket=decode_bucket,
        **options,
    )
