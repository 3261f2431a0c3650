"""What goes into the attention and the MLP of decoder layers, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from st3.engine.prefill import Prefill
from st3.engine.session import Session
from st3.errors import UnsupportedModelError
from st3.hf.hooks import Hooks


def listen_to_parts(hooks: Hooks, layers: Sequence[nn.Module], session: Session) -> None:
    """Show a prompt's ranker the parts of the layers that its score wants to see.

    Raises:
        UnsupportedModelError: layers that are made otherwise.
    """
    for index in session.plan.turns:
        for name in ("self_attn", "mlp"):
            part = getattr(layers[index], name, None)
            if not isinstance(part, nn.Module):
                raise UnsupportedModelError(
                    f"{type(layers[index]).__name__} has no {name}, which this policy looks at: "
                    "rank by another score, such as score=attention"
                )
            hooks.after(part, _hook(session, index))


def _hook(session: Session, layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        current = session.current
        if isinstance(current, Prefill):
            given = args[0] if args else kwargs["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            current.ranker.observe_part(layer, current.block, given, made)

    return hook
