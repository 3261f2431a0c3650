"""Worker side: a model's decoder layers, which drop visual rows where the plan says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from st3.vllm import attention
from st3.vllm.batch import CURRENT
from st3.vllm.plan import Plan


def attach(model: Any, plan: Plan) -> None:
    """Lay a plan on a loaded model of vLLM. Instance attributes only: its classes stay theirs.

    Raises:
        ValueError: layers or an attention backend that st3 does not know.
    """
    layers = model.get_language_model().model.layers
    for layer in layers:
        problem = _problem(layer)
        if problem:
            raise ValueError(f"st3 cannot trim this model: {problem}")
    for index, layer in enumerate(layers):
        attention.attach(layer.self_attn.attn, plan, index)
        layer.forward = _layer(layer.forward, index, index + 1 == len(layers))
    model.forward = _model(model.forward)
    if hasattr(model, "_get_deepstack_input_embeds"):
        model._get_deepstack_input_embeds = _deepstack(model._get_deepstack_input_embeds)


def _problem(layer: Any) -> str | None:
    """Why a decoder layer cannot be trimmed; None if it can."""
    kind = type(layer).__name__
    given = list(inspect.signature(layer.forward).parameters)
    if given[:3] != ["positions", "hidden_states", "residual"]:
        return f"its text model's layers ({kind}) take {', '.join(given)}, not rows and a residual"
    found = getattr(getattr(layer, "self_attn", None), "attn", None)
    if found is None:
        return f"its text model's layers ({kind}) have no self_attn.attn"
    return attention.problem(found)


def _layer(inner: Callable[..., Any], index: int, is_last: bool) -> Callable[..., Any]:
    """``forward`` of one decoder layer, aware of the rows that are left."""

    def forward(
        positions: Any, hidden_states: Any, residual: Any, *args: Any, **kwargs: Any
    ) -> Any:
        batch = None if torch.compiler.is_compiling() else CURRENT.batch
        if batch is None or not batch.prefills:
            return inner(positions, hidden_states, residual, *args, **kwargs)
        hidden_states, residual = batch.enter(index, hidden_states, residual)
        hidden_states, residual = inner(
            batch.positions(positions), hidden_states, residual, *args, **kwargs
        )
        if is_last:
            hidden_states, residual = batch.leave(hidden_states, residual)
        return hidden_states, residual

    return forward


def _model(inner: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of the whole model. Passes that hold a trimmed prompt run outside of the compiled
    decoder, whose layers all have the same rows; decode steps run inside of it."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    def forward(*args: Any, **kwargs: Any) -> Any:
        batch = CURRENT.batch
        if batch is not None and batch.prefills and is_forward_context_available():
            get_forward_context().skip_compiled = True
        try:
            return inner(*args, **kwargs)
        finally:
            CURRENT.batch = None

    return forward


def _deepstack(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Qwen3-VL adds features of its tower to all rows behind the first layers: let the rows that
    are dropped leave them, too."""

    def get(num_tokens: int) -> Any:
        found = inner(num_tokens)
        if CURRENT.batch is not None:
            CURRENT.batch.deepstack = found
        return found

    return get
