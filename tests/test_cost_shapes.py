"""Named shapes, and the cost model's own arithmetic."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
)

from st3.cost import (
    COLUMNS,
    TextDims,
    VisionDims,
    as_needed,
    cost_table,
    decode_bytes,
    decode_flops,
    kv_allocated_bytes,
    kv_bytes,
    kv_entries,
    mean_kv_bytes,
    prefill_flops,
    vision_flops,
    with_headroom,
)
from st3.cost.shapes import SHAPES, load_config, shape
from st3.methods.schedule import Anneal, Schedule
from tests.costs import (
    OTHERS,
    decoder_layers,
)
from tests.zoo import FAMILIES

# -- shapes ---------------------------------------------------------------------------------

# Parameters in billions, as the models' hub pages give them.
PUBLISHED = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-next-7b": 7.06,
    "llava-next-13b": 13.35,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-3b": 3.75,
    "qwen3-vl-8b": 8.77,
    "internvl3-8b": 7.94,
    "gemma-3-4b": 4.30,
    "smolvlm-2.2b": 2.25,
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_have_the_parameters_of_their_models(name: str) -> None:
    config = shape(name).config
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    if name in PUBLISHED:
        assert round(parameters / 1e9, 2) == PUBLISHED[name]
    _, layers = decoder_layers(model)
    held = sum(p.numel() for p in layers.parameters())
    counted = sum(layer.weights() for layer in TextDims.from_config(config).layers)
    assert counted <= held <= counted * 1.0003  # the rest are norms and biases


def test_a_shapes_config_is_fresh_every_time() -> None:
    changed = shape("llava-1.5-7b").config
    changed.text_config.num_hidden_layers = 2
    assert shape("llava-1.5-7b").config.text_config.num_hidden_layers == 32


def test_load_config_takes_shapes_folders_and_files(tmp_path: Any) -> None:
    config = FAMILIES["llava"].make_config()
    config.save_pretrained(tmp_path)
    assert load_config("qwen2.5-vl-7b").model_type == "qwen2_5_vl"
    for path in (tmp_path, tmp_path / "config.json"):
        assert load_config(path).text_config.hidden_size == config.text_config.hidden_size


def test_unknown_shapes_are_refused_with_the_known_names(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown shape 'llava'.*llava-1\.5-7b.*cpu-308m"):
        shape("llava")
    with pytest.raises(ValueError, match=r"neither a named shape.*gemma-3-4b"):
        load_config("nothing-like-this")
    with pytest.raises(ValueError, match="cannot load a config"):
        load_config(tmp_path)


# -- the model's own arithmetic -------------------------------------------------------------

DIMS_7B = TextDims.from_config(shape("llava-1.5-7b").config)


def test_llava_7b_by_hand() -> None:
    n, d, f = 64 + 576, 4096, 11008
    layer = prefill_flops(DIMS_7B, 64, 576).layers[0]
    assert layer.projections == 2 * n * 4 * d * d
    assert layer.mlp == 2 * n * 3 * d * f
    assert layer.scores == 4 * d * n * (n + 1) // 2
    assert kv_bytes(DIMS_7B, 64, 576) == 32 * 2 * d * n * 2


def test_a_schedule_that_drops_nothing_costs_nothing_less() -> None:
    everything = Schedule.from_shares([1.0] * 32)
    assert prefill_flops(DIMS_7B, 64, 576, everything) == prefill_flops(DIMS_7B, 64, 576)
    assert decode_flops(DIMS_7B, 64, 576, everything, 5) == decode_flops(DIMS_7B, 64, 576, step=5)
    assert kv_bytes(DIMS_7B, 64, 576, everything, 5) == kv_bytes(DIMS_7B, 64, 576, step=5)


def test_dropping_everything_leaves_the_cost_of_the_text() -> None:
    nothing = Schedule.from_shares([0.0] * 32)
    assert prefill_flops(DIMS_7B, 64, 576, nothing) == prefill_flops(DIMS_7B, 64, 0)
    assert kv_bytes(DIMS_7B, 64, 576, nothing, 3) == kv_bytes(DIMS_7B, 64, 0, step=3)


def test_annealing_shrinks_live_kv_at_once_and_buffers_when_they_move() -> None:
    schedule = Schedule.from_shares([0.5] * 32, Anneal("linear", tau=20, floor=0.0))
    assert kv_entries(DIMS_7B, 64, 100, schedule, 0) == [64 + 50] * 32
    assert kv_entries(DIMS_7B, 64, 100, schedule, 10) == [64 + 25 + 10] * 32
    assert kv_entries(DIMS_7B, 64, 100, schedule, 20) == [64 + 20] * 32
    one = 32 * 2 * 4096 * 2  # bytes of one entry in all layers
    held = [
        kv_allocated_bytes(DIMS_7B, 64, 100, schedule, step, rule=with_headroom(16)) / one
        for step in (0, 1, 10, 16, 17, 18)
    ]
    # A prompt is written, with room behind it, when the first further token comes.
    assert held[:4] == [64 + 50, *[64 + 50 + 16] * 3]
    grown = 64 + round(50 * (1 - 17 / 20) + 1e-9) + 17 + 16  # full: what is live moves
    assert held[4:] == [grown] * 2
    cut = kv_allocated_bytes(DIMS_7B, 64, 100, schedule, 10, rule=as_needed)
    assert cut == kv_bytes(DIMS_7B, 64, 100, schedule, 10) == (64 + 25 + 10) * one
    by_hand = [kv_bytes(DIMS_7B, 64, 100, schedule, step) for step in range(4)]
    assert mean_kv_bytes(DIMS_7B, 64, 100, schedule, 4) == sum(by_hand) / 4


def test_decode_reads_weights_once_and_the_cache_of_every_row() -> None:
    weights = DIMS_7B.lm_head + sum(layer.weights() for layer in DIMS_7B.layers)
    cache = kv_bytes(DIMS_7B, 64, 576, step=1)
    assert decode_bytes(DIMS_7B, 64, 576) == 2 * weights + cache
    assert decode_bytes(DIMS_7B, 64, 576, batch=8) == 2 * weights + 8 * cache
    assert decode_bytes(DIMS_7B, 64, 576, dtype="fp32") == 2 * decode_bytes(DIMS_7B, 64, 576)


def test_a_batch_reads_at_most_as_many_experts_as_there_are() -> None:
    layer = TextDims.from_config(OTHERS["mixtral"]()).layers[0]
    assert layer.weights(1) == layer.projections + layer.dense + 2 * layer.expert
    assert layer.weights(2) == layer.weights(50) == layer.weights(1) + 2 * layer.expert


def test_table_and_markdown() -> None:
    fastv = Schedule.from_shares([1.0, 1.0] + [0.5] * 30)
    rows = cost_table(shape("llava-1.5-7b").config, 64, 576, {"FastV": fastv}, new_tokens=16)
    assert [row.policy for row in rows] == ["untrimmed", "FastV"]
    plain, half = rows
    assert plain.prefill_ratio == plain.kv_mean_ratio == plain.mean_share == 1
    assert half.mean_visual == pytest.approx((2 * 576 + 30 * 288) / 32)
    assert half.prefill_tflops == prefill_flops(DIMS_7B, 64, 576, fastv).total / 1e12
    assert half.kv_prefill_mib * 2**20 == kv_bytes(DIMS_7B, 64, 576, fastv)
    assert half.vision_tflops == plain.vision_tflops > 0.3
    assert [len(row.cells()) for row in rows] == [len(COLUMNS)] * 2
    assert half.cells()[:3] == ["FastV", f"{half.prefill_tflops:.3g}", f"{half.prefill_ratio:.1%}"]


@pytest.mark.skipif(
    transformers.__version__.startswith("5.16"), reason="its Aria cannot be counted on meta"
)
def test_the_table_stands_without_a_known_tower() -> None:
    config = FAMILIES["aria"].make_config()
    assert cost_table(config, 64, 576, {})[0].vision_tflops is None


def test_the_tables_of_the_docs_are_up_to_date() -> None:
    script = Path(__file__).parent.parent / "docs" / "make_cost.py"
    made = runpy.run_path(str(script))
    page = script.with_name("cost.md").read_text(encoding="utf-8")
    assert "| ST3, S = 4 |" in page
    assert made["render"](page) == page, "run: python docs/make_cost.py"


# -- bad input ------------------------------------------------------------------------------


def test_unknown_decoders_and_towers_are_refused_by_name() -> None:
    from transformers import MambaConfig

    with pytest.raises(ValueError, match=r"decoder 'mamba'.*llama"):
        TextDims.from_config(MambaConfig())
    config = shape("llava-1.5-7b").config
    config.text_config.layer_types = ["chunked_attention"] * 32
    with pytest.raises(ValueError, match="chunked_attention"):
        TextDims.from_config(config)
    with pytest.raises(ValueError, match="no vision tower"):
        VisionDims.from_config(config.text_config)
    config.vision_config.model_type = "something_new"
    with pytest.raises(ValueError, match=r"something_new.*clip_vision_model"):
        VisionDims.from_config(config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prefill_flops(DIMS_7B, -1, 5), "cannot be negative"),
        (lambda: prefill_flops(DIMS_7B, 5, 5, Schedule.from_shares([1.0])), r"schedule\(32\)"),
        (lambda: decode_flops(DIMS_7B, 5, 5, step=0), "counted from 1"),
        (lambda: kv_bytes(DIMS_7B, 5, 5, step=-1), "cannot be negative"),
        (lambda: kv_bytes(DIMS_7B, 5, 5, dtype="int3"), "unknown dtype.*bfloat16"),
        (lambda: mean_kv_bytes(DIMS_7B, 5, 5, new_tokens=0), "at least 1"),
        (lambda: with_headroom(-1), "cannot be negative"),
        (lambda: cost_table(shape("cpu-308m").config, 5, 0, {}), "at least 1"),
        (lambda: vision_flops(VisionDims.from_config(shape("cpu-308m").config), -5), "negative"),
    ],
)
def test_bad_numbers_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
