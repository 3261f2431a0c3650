"""The cost model of layers with states, convolutions and shared KV entries, against what torch
counts on the real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import st3
from st3.cost import TextDims, cost_table, decode_flops, kv_bytes, prefill_flops, state_bytes
from st3.engine.plan import lay_out
from st3.engine.wiring import Wiring
from st3.hf import states
from st3.hf.call import CACHE
from tests.costs import count
from tests.hybrids.cases import POLICIES
from tests.slow_hybrids import text_of
from tests.zoo import HYBRIDS, INDEXED, Family, I, T

ALL = pytest.mark.parametrize("name", list(HYBRIDS))
KNOWN = {**HYBRIDS, **{n: f for n, f in INDEXED.items() if n == "minimax_m3_vl"}}
CHUNK = 64  # tokens: states work on chunks, which these prompts fill


def model_of(name: str) -> tuple[Family, Any]:
    family, model = KNOWN[name], KNOWN[name].model()
    text_of(model).config._attn_implementation = "eager"
    model.set_experts_implementation("eager")  # the counter sees no grouped product
    return family, model


def prompt(family: Family, model: Any, length: int) -> tuple[Any, int]:
    """Inputs of ``length`` tokens with one image, and how many of them are visual."""
    short = family.inputs(model, [[T(2), I(), T(10)]])["input_ids"].shape[1]
    batch = family.inputs(model, [[T(2 + length - short), I(), T(10)]])
    return batch, int(family.visual_mask(model, batch).sum())


def layers_of(model: Any) -> list[str]:
    """The names of the decoder layers."""
    layers = text_of(model).layers
    where = next(name for name, module in model.named_modules() if module is layers)
    return [f"{where}.{i}" for i in range(len(layers))]


def counted(model: Any, batch: Any) -> tuple[list[int], Any]:
    """FLOPs of each decoder layer in a prefill, and the cache."""
    cache = DynamicCache(config=text_of(model).config)
    flops, _ = count(model, **batch, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return [flops[name] for name in layers_of(model)], cache


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_prefill_costs_what_torch_counts(name: str) -> None:
    """A state's convolution works on a few columns of padding, too, which are not counted."""
    family, model = model_of(name)
    dims = TextDims.from_config(model.config)
    found = {}
    for length in (CHUNK, 3 * CHUNK):
        batch, visual = prompt(family, model, length)
        real, cache = counted(model, batch)
        said = prefill_flops(dims, length - visual, visual, attention="full").layers
        found[length] = [(a, b.total) for a, b in zip(real, said, strict=True)]
    for i, layer in enumerate(dims.layers):
        (real, said), (more_real, more_said) = found[CHUNK][i], found[3 * CHUNK][i]
        if layer.mixing:
            # (Mamba sums over pairs of chunks, too: a thousandth here.)
            assert more_real - real == pytest.approx(more_said - said, rel=0.01), i
            assert said <= real <= 1.05 * said, i
        else:
            assert (real, more_real) == (said, more_said), i
    held = [(getattr(la, "keys", None), getattr(la, "values", None)) for la in cache.layers]
    entries = sum(t.nbytes for pair in held for t in pair if t is not None)
    windows = [layer.window for layer in dims.layers]
    if not any(windows):  # transformers' layers with a window hold a token less than that
        assert entries == kv_bytes(dims, 3 * CHUNK - visual, visual, dtype=torch.float32)
    held_states = sum(map(states.state_bytes, cache.layers))
    assert held_states == state_bytes(dims, torch.float32)
    assert (held_states > 0) == any(layer.state for layer in dims.layers)


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_decode_step_costs_what_torch_counts(name: str) -> None:
    """But for the rule of a state, whose steps have a form of their own."""
    family, model = model_of(name)
    dims = TextDims.from_config(model.config)
    batch, visual = prompt(family, model, CHUNK)
    _, cache = counted(model, batch)
    ids = torch.full((1, 1), 40)
    flops, _ = count(model, input_ids=ids, **{CACHE: cache}, use_cache=True)
    real = sum(flops[name] for name in layers_of(model))
    said = decode_flops(dims, CHUNK - visual, visual) - 2 * (dims.inputs + dims.lm_head)
    mixing = sum(layer.mixing for layer in dims.layers)
    assert abs(real - said) <= mixing  # 0 where there are no states


@pytest.mark.parametrize("name", [n for n in ("gemma4_shared", "gemma3n") if n in HYBRIDS])
@pytest.mark.parametrize("keep", [1, 2], ids=["last", "two"])
def test_layers_that_share_see_no_visual_token(name: str, keep: int) -> None:
    """Also if more than the last logits are asked for, where the model itself cuts nothing."""
    family, model = model_of(name)
    dims = TextDims.from_config(model.config)
    batch, visual = prompt(family, model, CHUNK)
    policy = st3.FastV(layer=2, drop=0.5)
    with st3.trim(model, policy) as trimmer:
        flops, _ = count(model, **batch, use_cache=True, logits_to_keep=keep)
        schedule = trimmer.schedule
    names = layers_of(model)
    said = prefill_flops(dims, CHUNK - visual, visual, schedule, attention="full").layers
    for i in range(trimmer.wiring.first_shared, 8):
        if keep == 1 or not dims.layers[i].last_only:
            assert flops[names[i]] == said[i].total
        else:
            assert flops[names[i]] > said[i].total


@ALL
def test_tables_of_costs(name: str) -> None:
    config = HYBRIDS[name].make_config()
    dims = TextDims.from_config(config)
    policy = POLICIES["anneal"][0]
    assert policy is not None
    schedule = lay_out(policy, Wiring(dims.sources))
    with st3.trim(HYBRIDS[name].model(), policy) as trimmer:
        assert trimmer.schedule == schedule
    full, less = cost_table(config, 20, 40, {"st3": schedule})
    assert less.prefill_tflops < full.prefill_tflops
    assert less.kv_prefill_mib <= full.kv_prefill_mib  # a window may hold as much as before
    shared = [i for i, source in enumerate(dims.sources) if source not in (i, None)]
    assert all(schedule.kept(i, 40) == 0 for i in shared)
