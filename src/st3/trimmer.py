"""Attach a policy to an unmodified transformers model, and take it back without a trace."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from st3.engine import compiled
from st3.engine.events import Events, Observer
from st3.engine.masks import kind_of
from st3.engine.parallel import head_group
from st3.engine.plan import Plan, lay_out
from st3.engine.session import Session
from st3.engine.wiring import Wiring
from st3.errors import TrimStateError
from st3.hf.attach import Attachment
from st3.hf.attention import attention_of
from st3.hf.cache import compact, stores_of
from st3.hf.check import check
from st3.hf.generation import check_generation
from st3.hf.hooks import Hooks
from st3.methods import DEFAULT_POLICY
from st3.methods.policies import Policy, PolicyLike, check_model, parse, with_budget
from st3.methods.scores import needs_of
from st3.models import base_model, family_of, model_facts
from st3.models.visual import check_visual_mask
from st3.report import Report, Reporter

MODEL_ATTRIBUTE = "_st3_trimmer"


class Trimmer:
    """Trims the visual tokens of a transformers vision-language model while in a ``with`` block, or
    between :meth:`attach` and :meth:`detach`. :func:`st3.trim` is this class.

    Args:
        model: any supported ``AutoModelForImageTextToText``, or a PeftModel around one; it is not
            modified.
        policy: an st3 policy, a string such as ``"st3-7b"`` or ``"fastv:layer=2,drop=0.5"``, or
            the name of a file that ``st3 tune`` wrote, ``"policy.json"``.
        per_image: give each image of a prompt the policy's share of its own tokens, in place of
            one budget for all of a prompt's images.
        own_cache: use st3's preallocated cache also if the policy drops nothing.
        visual_mask: [B, T] bool, which tokens of the prompt are visual, for prompts passed as
            ready-made ``inputs_embeds`` without ``pixel_values``.
        untested: try a family that st3 has no tests for.
        compile_decode: how decode steps run as one graph over buffers of fixed size: "graphs" for
            CUDA graphs, which are there at once; a mode of torch.compile ("default",
            "reduce-overhead" ...) or a dict of its keyword arguments, which take long to compile.
            None runs steps as they are. It pays where decoding is bound by kernel launches.
        decode_bucket: tokens to which the size of those buffers is rounded up.
        options: further arguments of the policy, e.g. ``trim(model, "st3", tau=64)``, or
            ``budget=0.35``, the mean share of the visual tokens over the layers.

    Attributes:
        schedule: what the policy keeps on this model.
        family, parts: what it is dropped from.
        active: whether anything of a pass is changed; a policy that drops nothing only watches.

    Raises:
        ValueError: unknown policy or argument, or one that does not fit the model's layers.
        TypeError: a ``visual_mask`` that is no such tensor.
        UnsupportedModelError: a model, attention kernel or cache that cannot be trimmed.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: PolicyLike = DEFAULT_POLICY,
        *,
        per_image: bool = False,
        own_cache: bool = False,
        visual_mask: Tensor | None = None,
        untested: bool = False,
        compile_decode: str | dict[str, Any] | None = None,
        decode_bucket: int = 256,
        **options: Any,
    ) -> None:
        self.model: Any = base_model(model)
        given = parse(policy, **options)
        self.per_image, self.visual_mask = per_image, check_visual_mask(visual_mask)
        self.compile_decode, self.decode_bucket = compile_decode, decode_bucket
        self.family = family_of(model, untested)
        self.parts = self.family.parts(model)
        check_model(given, model_facts(self.model.config))
        self._policy = with_budget(given, len(self.parts.layers))
        if per_image and self.policy.rerank:
            raise ValueError(
                "per_image=True and rerank_every exclude each other: a new ranking does not know "
                "the images' own budgets"
            )
        parts = self.parts
        self.wiring = Wiring(parts.sources, parts.in_order, parts.borrows, parts.pads)
        self.schedule = lay_out(self.policy, self.wiring, parts.windows)
        self.active = self.schedule.drops or own_cache
        self._reporter = Reporter(str(self.policy), self.schedule, self.model.config)
        self._events = Events()
        self._events.add(self._reporter)
        self._hooks = Hooks()
        self._attachment: Attachment | None = None
        self._latest_cache: weakref.ref[Any] | None = None
        self._outer: Trimmer | None = None

    def __repr__(self) -> str:
        state = "attached" if self.attached else "not attached"
        return f"<Trimmer of {type(self.model).__name__}: {self.policy}, {state}>"

    @property
    def policy(self) -> Policy:
        """What is dropped. Fixed: a schedule, hooks and caches are made for it."""
        return self._policy

    @policy.setter
    def policy(self, policy: Any) -> None:
        raise AttributeError("a trimmer's policy is fixed: make another with st3.trim(model, ...)")

    # Life cycle -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def attach(self) -> Trimmer:
        """Start trimming. On a model that is trimmed already, this trimmer takes over until it is
        detached. Changes the model instance; :meth:`detach` restores it.

        Raises:
            TrimStateError: if this very trimmer is attached already.
            UnsupportedModelError: if the model's present settings cannot be trimmed.
        """
        outer = trimmer_of(self.model)
        if self._is_below(outer):
            raise TrimStateError("this trimmer is attached already: detach() it first")
        if outer is not None:
            outer._unhook()
        try:
            if self.active:
                self._check_settings()
            self._hook()
        except Exception:
            self._unhook()
            if outer is not None:
                outer._hook()
            raise
        self._outer = outer
        return self

    def detach(self) -> None:
        """Stop trimming and leave nothing behind on the model. Does nothing if not attached.

        Raises:
            TrimStateError: if another trimmer was attached on top and is still there.
        """
        current = trimmer_of(self.model)
        if current is not self:
            if self._is_below(current):
                raise TrimStateError(
                    "another trimmer is attached on top of this one: detach it first"
                )
            return
        self._unhook()
        if self._outer is not None:
            self._outer._hook()
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
        plan = self._plan()
        bucket = None
        if self.compile_decode is not None and self.active:
            compiled.check(plan)
            bucket = self.decode_bucket
        session = Session(plan, self.active, bucket, self._events)
        self._attachment = Attachment(
            self.model, self.family, self.parts, session, self.visual_mask, self.compile_decode
        )
        self._hooks.replace(self.model, MODEL_ATTRIBUTE, self)
        self._attachment.install(self._hooks)
        for module in (self.model, self.parts.inner, self.parts.text):
            self._hooks.copies_clean(module)

    def _plan(self) -> Plan:
        policy, score = self.policy, self.policy.scorer()
        rotary = self.active and "rotary" in needs_of(score)
        return Plan(
            schedule=self.schedule,
            score=score,
            rerank=policy.rerank,
            recalls=policy.recalls,
            per_head=policy.per_head,
            unrotate=self.family.inverse_rotation(self.parts) if rotary else None,
            kind=kind_of(attention_of(self.parts.text.config)),
            windows=self.parts.windows,
            wiring=self.wiring,
            per_image=self.per_image,
            ranks=head_group(next(iter(self.parts.softmax.values()))),
        )

    def _unhook(self) -> None:
        self._hooks.restore()
        if self._attachment is not None:
            self._latest_cache = self._attachment.latest_cache or self._latest_cache
            self._attachment.session.abandon()
            self._attachment = None

    def _check_settings(self) -> None:
        check(self.parts)
        check_generation(getattr(self.model, "generation_config", None))

    # Results ----------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """The :class:`~st3.Report` of the latest generate() or forward() with an image.

        Raises:
            TrimStateError: if there was none yet, or if the latest prompt had no image.
        """
        return self._reporter.report

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Let ``observer`` look in while in the block. The trimmer must be attached, and no pass
        under way.

        Raises:
            TrimStateError: if the trimmer is not attached.
        """
        if not self.attached:
            raise TrimStateError("only an attached trimmer can be observed: attach() it first")
        before = self._events.attends
        self._events.add(observer)
        try:
            self._hook_again(before)
            yield
        finally:
            before = self._events.attends
            self._events.remove(observer)
            if self.attached:
                self._hook_again(before)

    def observers(self, kind: type[Observer]) -> list[Observer]:
        """The observers of a kind that look in now."""
        return [observer for observer in self._events.observers if isinstance(observer, kind)]

    def _hook_again(self, before: bool) -> None:
        """Put attention hooks on, or take them off, where nothing but an observer wants them."""
        if not self.active and before != self._events.attends:
            self._unhook()
            self._hook()

    def compact(self) -> int:
        """Free the KV entries that annealing has released, of the latest cache. Changes that cache:
        it cannot be cropped behind what is freed.

        Returns:
            the bytes freed.

        Raises:
            TrimStateError: in the middle of a forward pass, or after one that was broken off.
        """
        attachment = self._attachment
        with attachment.lock if attachment is not None else nullcontext():
            if attachment is not None:
                self._latest_cache = attachment.latest_cache or self._latest_cache
            latest = self._latest_cache() if self._latest_cache is not None else None
            freed = compact(latest)
            self._reporter.sample(list(stores_of(latest).values()))
        return freed


def trimmer_of(model: nn.Module) -> Trimmer | None:
    """The trimmer that is attached to a model, or None."""
    found: Trimmer | None = base_model(model).__dict__.get(MODEL_ATTRIBUTE)
    return found


trim = Trimmer
