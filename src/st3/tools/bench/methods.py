"""What is compared: the untouched model, st3's cache alone, trimming policies, others' code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import st3
from st3.methods.policies import FastV, NoTrim, Policy, Random, parse
from st3.tools.bench.fastv_official import fastv_official
from st3.tools.bench.prompts import Prompt

Attach = Callable[[Any, Prompt], AbstractContextManager[Any]]

UNTOUCHED = "untouched"
OWN_CACHE = "untrimmed, st3's cache"
ATTACHED = "attached, drops nothing"
DOWNSAMPLE = "downsample"


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        label: its name there.
        attach: (model, prompt) -> context in which the model works that way; it gives a Trimmer
            where one is at work.
        policy: whose counts it has; None for all visual tokens.
        own_engine: whether st3's engine trims.
        equal_rows: whether it needs rows of equal layout.
        asked: whether it is a policy that was asked for, and no reference or peer.
        fewer: a policy whose mean share of the visual tokens is all that its prompts have.
    """

    label: str
    attach: Attach
    policy: Policy | None = None
    own_engine: bool = False
    equal_rows: bool = False
    asked: bool = False
    fewer: Policy | None = None


def untouched() -> Method:
    """The model as transformers made it, on its DynamicCache: the reference of all ratios."""
    return Method(UNTOUCHED, lambda model, prompt: nullcontext())


def own_cache() -> Method:
    """Nothing dropped, but st3's preallocated cache and decode path: what of a gain is not due to
    trimming."""

    def attach(model: Any, prompt: Prompt) -> st3.Trimmer:
        return st3.trim(model, "none", own_cache=True, visual_mask=prompt.visual)

    return Method(OWN_CACHE, attach)


def attached() -> Method:
    """A policy that drops nothing: what being attached costs."""

    def attach(model: Any, prompt: Prompt) -> st3.Trimmer:
        return st3.trim(model, "none", visual_mask=prompt.visual)

    return Method(ATTACHED, attach)


def trimmed(policy: Policy) -> Method:
    """A policy on st3's engine."""

    def attach(model: Any, prompt: Prompt) -> st3.Trimmer:
        return st3.trim(model, policy, visual_mask=prompt.visual)

    return Method(str(policy), attach, policy, own_engine=not isinstance(policy, NoTrim))


def downsample(policy: Policy) -> Method:
    """The untouched model on as few visual tokens as ``policy`` keeps on average: what an image
    made smaller gives, where a model makes fewer tokens of it."""
    return Method(DOWNSAMPLE, lambda model, prompt: nullcontext(), fewer=policy)


def fastv_by_its_authors(policy: FastV) -> Method:
    """FastV by ``output_attentions``, see :mod:`st3.tools.bench.fastv_official`."""

    def attach(model: Any, prompt: Prompt) -> AbstractContextManager[None]:
        return fastv_official(model, prompt.visual, policy.layer, policy.drop)

    return Method(f"{policy} (authors' way)", attach, policy, equal_rows=True)


def compare(policies: Sequence[str | Policy], peers: bool = True) -> list[Method]:
    """The rows for these policies: the references first and, with ``peers``, random choice at the
    first policy's counts, the image made smaller to its mean share, FastV on this engine and as its
    authors do it, and VTW.

    Raises:
        ValueError: no policy, or one that :func:`st3.methods.policies.parse` refuses.
    """
    chosen = [parse(policy) for policy in policies]
    asked = {str(policy) for policy in chosen}
    if not chosen:
        raise ValueError("no policy to measure: give at least one, such as st3")
    methods, first = [untouched(), own_cache()], chosen[0]
    if peers:
        chosen += [Random(like=chosen[0]), FastV(), parse("vtw")]
    seen: set[str] = set()
    for policy in chosen:
        if str(policy) not in seen:
            seen.add(str(policy))
            methods.append(replace(trimmed(policy), asked=str(policy) in asked))
        if isinstance(policy, FastV) and peers:
            methods.append(fastv_by_its_authors(policy))
    if peers and not isinstance(first, NoTrim):
        methods.append(downsample(first))
    return list({method.label: method for method in methods}.values())
