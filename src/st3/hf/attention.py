"""Attention functions that let a pass see, and change, what a decoder layer's attention is given.

They are entered into transformers' two registries, ``AttentionInterface`` and
``AttentionMaskInterface``, under names of their own (``st3_sdpa`` ...). That is the extension
point made for this: no model uses them until its text config says so.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from st3.engine.calls import AttentionCall
from st3.engine.plan import Attend
from st3.errors import UnsupportedModelError
from st3.hf.indexed import index_mask

if TYPE_CHECKING:
    from st3.engine.session import Session

WRAPPED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
PREFIX = "st3_"
ATTRIBUTE = "_st3_layer"
TOWER = "_st3_tower"
"""Hangs on an attention module of the vision tower whose queries and keys are looked at: called
with them, the mask and the keyword arguments."""


class LayerHandle:
    """Hangs on a decoder layer's attention module while the model is trimmed."""

    __slots__ = ("base", "layer", "session")

    def __init__(self, layer: int, base: Attend, session: Session) -> None:
        self.layer = layer
        self.base = base
        self.session = session


def attention_of(config: Any) -> str:
    """The name of a text model's own attention implementation."""
    return str(config._attn_implementation or "eager").removeprefix(PREFIX)


@contextmanager
def attention_set(config: Any, name: str) -> Iterator[None]:
    """A config's attention is ``name`` while in the block."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def on_unplanned_kernels(forward: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """A text model's ``forward`` whose trimmed passes do without cuDNN's sdpa kernels, on CUDA.

    Recent GPUs take those first. They are planned anew for each length, which takes 20 ms (H100,
    torch 2.11), and a trimmed model has another length in most layers and steps. This is torch's
    own switch. It holds for the process: an untrimmed model that runs in another thread meanwhile
    takes another kernel, too.
    """
    cuda = torch.backends.cuda

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        on_cuda = embeds is not None and embeds.device.type == "cuda"
        if session.current is None or not on_cuda or not cuda.cudnn_sdp_enabled():
            return forward(*args, **kwargs)
        cuda.enable_cudnn_sdp(False)
        try:
            return forward(*args, **kwargs)
        finally:
            cuda.enable_cudnn_sdp(True)

    return run


def base_attention(name: str, module: nn.Module) -> Attend:
    """The attention function ``name`` of a family: its own eager one, or transformers' kernel."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    source = sys.modules[type(module).__module__]
    eager = getattr(source, "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no eager attention of its own: load the model with "
            "attn_implementation='sdpa'"
        )
    return eager


def registered(name: str) -> str:
    """The name of the seam's version of attention ``name``, registered at its first use.

    Raises:
        UnsupportedModelError: for attention kernels without one.
    """
    if name not in WRAPPED:
        raise UnsupportedModelError(
            f"attention {name!r} is not supported: load the model with attn_implementation set to "
            f"one of {', '.join(WRAPPED)}"
        )
    own = PREFIX + name
    if own not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(own, _attention)
        AttentionMaskInterface.register(own, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return own


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: [B, heads, Q, size] -> [B, Q, heads, size]."""
    if kwargs.get("indices") is not None or kwargs.get("block_indices") is not None:
        attention_mask = index_mask(module, query, key, attention_mask, kwargs)
    handle: LayerHandle | None = getattr(module, ATTRIBUTE, None)
    if handle is None:  # the tower, or another model that shares the config of the trimmed one
        looks = getattr(module, TOWER, None)
        if looks is not None:
            looks(query, key, attention_mask, kwargs)
        base = base_attention(attention_of(module.config), module)
        return base(module, query, key, value, attention_mask, **kwargs)
    current = handle.session.current
    if current is None:
        return handle.base(module, query, key, value, attention_mask, **kwargs)
    call = AttentionCall(handle.base, module, query, key, value, attention_mask, kwargs)
    with handle.session.events.span("choose"):
        return current.attend(handle.layer, call)
