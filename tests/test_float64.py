"""Nothing is computed in double precision, which Apple GPUs do not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import st3
from tests.helpers import METHODS, POLICIES, SCORED, Case

ALL = {**POLICIES, **METHODS, **SCORED}


class NoFloat64(TorchDispatchMode):
    """Raises where an operation gives a float64 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} gives a float64 tensor")
        return result


def test_float64_is_noticed() -> None:
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        torch.ones(2).double()


@pytest.mark.parametrize("name", ALL)
def test_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every score, as the engine calls it."""
    score = ALL[name].scorer()
    called = []
    for method in ("__call__", "prepare"):
        original = getattr(type(score), method, None)
        if not callable(original):  # another score's
            continue

        def watched(self: Any, view: Any, original: Any = original) -> Any:
            called.append(self)
            with NoFloat64():
                return original(self, view)

        monkeypatch.setattr(type(score), method, watched)
    run(ALL[name])
    assert score in called or not ALL[name].schedule(8).drops or name == "vtw"


@pytest.mark.parametrize("name", ALL)
def test_a_whole_answer(name: str) -> None:
    """Prefill and decode steps."""
    with NoFloat64():
        run(ALL[name])


def run(policy: st3.Policy) -> None:
    Case.of("llava").generate(policy, 4)
