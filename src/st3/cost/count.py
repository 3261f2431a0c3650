"""What a model costs, counted on the real modules in place of a closed form.

A text model runs without numbers (on the meta device) on prompts of two lengths, and one decode
step. torch's own formulas for the FLOPs of each operation (:mod:`torch.utils.flop_counter`) then
give, for each layer, what every token costs and what every pair of tokens costs; the KV cache says
how large an entry is; the step must cost what these say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import DynamicCache

from st3.cost.dims import LayerDims, Lookahead, TextDims
from st3.hf.call import CACHE

_LENGTHS = (5, 9)
_CHUNK = 64  # layers with a state work on chunks of so many tokens, which shorter prompts fill


class _Counter(TorchDispatchMode):
    """FLOPs by place. FlopCounterMode would do, but hooks the modules of all threads."""

    def __init__(self) -> None:
        super().__init__()
        self.places = ["rest"]
        self.flops: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if formula is not None:
            place = self.places[-1]
            flops = formula(*args, **kwargs, out_val=result)
            self.flops[place] = self.flops.get(place, 0) + flops
        return result

    def watch(self, module: nn.Module, place: str, stack: ExitStack) -> None:
        """Count what ``module`` does under ``place``, as long as ``stack`` is open."""

        def enter(*_: Any) -> None:
            self.places.append(place)

        def leave(*_: Any) -> None:
            self.places.pop()

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)


def count_flops(call: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of a call without numbers, and what it returned."""
    counter = _Counter()
    with torch.inference_mode(False), torch.no_grad(), counter:
        result = call()
    return sum(counter.flops.values()), result


def count_text(
    text: Any,
    layers: Sequence[nn.Module],
    mixers: Sequence[nn.Module | None],
    windows: Sequence[int | None],
    lookahead: Sequence[Lookahead],
    sources: Sequence[int | None],
) -> TextDims:
    """The dimensions of a text model on the meta device with eager attention.

    Args:
        text: takes ``inputs_embeds`` [1, T, hidden] and runs ``layers``.
        mixers: the attention of each layer, or what it has in place of one; None where it has
            neither.
        windows, lookahead: of each layer.
        sources: the layer whose KV entries each layer reads; None where it has a state.

    Raises:
        ValueError: a decoder that does not run without numbers, or whose layers do not cost so much
            a token and so much a pair of tokens.
    """
    config = text.config
    try:
        passes: list[dict[str, int]] = []
        chunk = max(_CHUNK, getattr(config, "chunk_size", None) or 0)
        lengths = (chunk, 2 * chunk) if None in sources else _LENGTHS
        for tokens in lengths:
            cache = DynamicCache(config=config)
            passes.append(_run(text, layers, mixers, cache, tokens))
        step = _run(text, layers, mixers, cache, 1)
    except (NotImplementedError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"no cost model for the decoder {config.model_type!r}: it has no closed form, and "
            f"cannot be counted on the meta device ({type(error).__name__}). Describe it with "
            "TextDims(...) by hand"
        ) from error
    cuts = hasattr(text, "_maybe_slice_kv_shared_inputs")
    made: list[LayerDims] = []
    for i, (layer, source) in enumerate(zip(layers, sources, strict=True)):
        if source is None:
            made.append(_state(layer, mixers[i], passes, lengths, cache.layers[i], i))
            continue
        held = cache.layers[source]
        dim = _layer(layer, mixers[i], passes, lengths, held, i, windows[i], lookahead[i], config)
        shared = source != i
        made.append(replace(dim, source=source, last_only=cuts) if shared else dim)
    dims = TextDims(
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        layers=tuple(made),
        inputs=_split(passes, lengths, "rest")[0] // 2,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )
    for i, dim in enumerate(dims.layers):
        if not dim.heads:
            continue
        read = step.get(f"{i}", 0) + step[f"{i}.attention"]
        keys = min(lengths[1] + 1, windows[i] or lengths[1] + 1)
        if read != 2 * (dim.projections + dim.mlp) + dim.pair * keys:
            raise ValueError(
                f"no cost model for the decoder {config.model_type!r}: its decode steps work on "
                "more than their own token"
            )
    return dims


def _run(
    text: Any,
    layers: Sequence[nn.Module],
    mixers: Sequence[nn.Module | None],
    cache: Any,
    tokens: int,
) -> dict[str, int]:
    """FLOPs of ``tokens`` further tokens: of each layer, of its attention (not counted twice), of
    the rotary tables and of the rest."""
    embeds = torch.empty(1, tokens, text.config.hidden_size, device="meta", dtype=text.dtype)
    counter = _Counter()
    with ExitStack() as stack:
        for i, (layer, mixer) in enumerate(zip(layers, mixers, strict=True)):
            counter.watch(layer, f"{i}", stack)
            if mixer is not None:
                counter.watch(mixer, f"{i}.attention", stack)
        for name, module in text.named_modules():
            if name.endswith("rotary_emb"):
                counter.watch(module, "rotary", stack)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        text(inputs_embeds=embeds, use_cache=True, **{CACHE: cache}, **_per_layer(text, embeds))
    return counter.flops


def _per_layer(text: Any, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs to each layer of a text model that has any: it makes them of token ids."""
    size = getattr(text.config, "hidden_size_per_layer_input", 0)
    if not size:
        return {}
    shape = (*embeds.shape[:2], text.config.num_hidden_layers, size)
    return {"per_layer_inputs": embeds.new_empty(shape)}


def _state(
    layer: nn.Module,
    mixer: nn.Module | None,
    passes: Sequence[dict[str, int]],
    lengths: Sequence[int],
    held: Any,
    index: int,
) -> LayerDims:
    """A layer with a state, or one in which no token sees another. A state's convolution also works
    on a few columns of padding in front of each prompt, which are left out."""
    first, second = (flops.get(f"{index}.attention", 0) for flops in passes)
    token = (second - first) // (lengths[1] - lengths[0])
    modules = () if mixer is None else mixer.modules()
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    projections = sum(module.weight.numel() for module in linear)
    weights, rest = _split(passes, lengths, f"{index}")
    if rest:
        raise ValueError(f"no cost model for layer {index}: it is no state with an MLP")
    expert, experts, chosen = _experts(layer, mixer, weights // 2)
    states: list[Any] = []
    for name in ("conv_states", "recurrent_states"):
        states += getattr(held, name, {}).values()
    return LayerDims(
        heads=0,
        kv_heads=0,
        head_dim=0,
        projections=projections,
        dense=weights // 2 - expert * chosen,
        expert=expert,
        experts=experts,
        experts_per_token=chosen,
        mixing=token - 2 * projections,
        state=sum(state[0].numel() for state in states if state is not None),
    )


def _layer(
    layer: nn.Module,
    mixer: nn.Module | None,
    passes: Sequence[dict[str, int]],
    lengths: Sequence[int],
    kept: Any,
    index: int,
    window: int | None,
    lookahead: Lookahead,
    config: Any,
) -> LayerDims:
    token, pair = _split(passes, lengths, f"{index}.attention")
    weights, rest = _split(passes, lengths, f"{index}")
    if rest or not pair:
        raise ValueError(
            f"no cost model for the decoder {config.model_type!r}: its layer {index} is no softmax "
            "attention with an MLP"
        )
    (_, kv_heads, _, head_dim), value_dim = kept.keys.shape, kept.values.shape[-1]
    heads, odd = divmod(pair, 2 * (head_dim + value_dim))
    if odd:
        raise ValueError(
            f"no cost model for the decoder {config.model_type!r}: its attention does not work on "
            "the keys and values that it stores"
        )
    expert, experts, chosen = _experts(layer, mixer, weights // 2)
    return LayerDims(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        projections=token // 2,
        dense=weights // 2 - expert * chosen,
        expert=expert,
        experts=experts,
        experts_per_token=chosen,
        window=window,
        lookahead=lookahead,
        value_dim=None if value_dim == head_dim else value_dim,
    )


def _split(passes: Sequence[dict[str, int]], lengths: Sequence[int], place: str) -> tuple[int, int]:
    """FLOPs a token and FLOPs a pair, from those of the two prompts: ``f = token n + pair n^2``."""
    n, m = lengths
    a, b = (flops.get(place, 0) for flops in passes)
    pair, odd = divmod(b * n - a * m, n * m * (m - n))
    token, odd_too = divmod(a - pair * n * n, n)
    if odd or odd_too:
        raise ValueError("no cost model for a decoder whose cost is not a polynomial of its tokens")
    return token, pair


def _experts(layer: nn.Module, mixer: Any, weights: int) -> tuple[int, int, int]:
    """Weights of one expert, how many there are, and how many a token passes; ``weights`` are those
    that a token passes outside of attention. Experts are stacked in tensors of three dimensions."""
    attention = set() if mixer is None else {id(p) for p in mixer.parameters()}
    stacks = [p for p in layer.parameters() if p.dim() == 3 and id(p) not in attention]
    if not stacks or len({p.shape[0] for p in stacks}) > 1:
        return 0, 0, 0
    expert = sum(p[0].numel() for p in stacks)
    flat = [p for p in layer.parameters() if p.dim() == 2 and id(p) not in attention]
    chosen, odd = divmod(weights - sum(p.numel() for p in flat), expert)
    return (expert, stacks[0].shape[0], chosen) if chosen > 0 and not odd else (0, 0, 0)
