"""The text model's forward, compiled for decode steps of one token."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from st3.engine.compiled import CompiledStep
from st3.engine.session import Session
from st3.hf import graphs
from st3.hf.call import compiled_arguments

_number = itertools.count()
MODES = (graphs.MODE, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compiled_forward(
    forward: Callable[..., Any], options: str | dict[str, Any], session: Session
) -> Callable[..., Any]:
    """A text model's ``forward``: compiled for decode steps, as it is for everything else.

    Args:
        options: a mode of torch.compile or its keyword arguments, or "graphs" for CUDA graphs that
            are recorded without it.

    Raises:
        ValueError: for an unknown mode.
    """
    if options in (graphs.MODE, {"mode": graphs.MODE}):
        return graphs.recorded_forward(forward, session)
    if isinstance(options, str):
        if options not in MODES:
            raise ValueError(f"unknown compile_decode={options!r}: use one of {', '.join(MODES)}")
        options = {"mode": options}

    def run(**kwargs: Any) -> Any:
        return forward(**kwargs)

    # torch counts graphs per code object and stops at eight: each trimmer gets one of its own,
    # so that attaching again, or to another model, starts from zero.
    run.__code__ = run.__code__.replace(co_name=f"decode_step_{next(_number)}")
    compiled = torch.compile(run, dynamic=False, fullgraph=True, **options)

    def step_or_pass(*args: Any, **kwargs: Any) -> Any:
        step = session.current
        if not isinstance(step, CompiledStep):
            return forward(*args, **kwargs)
        output = compiled(**compiled_arguments(kwargs, step.position))
        step.done()
        return output

    return step_or_pass
