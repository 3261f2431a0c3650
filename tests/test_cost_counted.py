"""Decoders and towers without a closed form, counted on the model itself."""

from __future__ import annotations

import pytest
import torch

from st3.cost import (
    TextDims,
    cost_table,
    decode_flops,
    kv_bytes,
    prefill_flops,
)
from st3.hf.call import CACHE, cache_of
from st3.models import config_family, decoders, find_parts, meta
from tests.costs import (
    DESCRIBED,
    OTHERS,
    count,
    decoder_layers,
    held_bytes,
    one_image,
)
from tests.zoo import FAMILIES, I, T, build

# Decoders that have no closed form: the model itself is counted, without its weights.
COUNTED = [
    "aria",
    "cohere_compass",
    "cosmos3_edge",
    "deepseek_ocr2",
    "emu3",
    "fuyu",
    "gemma4_unified",
    "granite_docling",
    "hyperclovax_vision_v2",
    "muse_glimmer",
    "muse_spark",
]


@pytest.mark.parametrize("name", [name for name in COUNTED if name in FAMILIES])
def test_counted_decoders_cost_what_torch_counts_on_the_real_model(name: str) -> None:
    """On another number of tokens than it was counted on, with weights, in prefill and decode."""
    model, batch, n_text, n_visual = one_image(name, "eager")
    assert decoders.closed_form(model.config, lambda text, window: "none") is None
    text = find_parts(model).text.config
    text._attn_implementation = "sdpa"
    try:
        dims = TextDims.from_config(model.config)
    except ValueError:
        if name != "aria":
            raise
        pytest.skip("in transformers 5.16 it counts its experts' tokens")
    assert text._attn_implementation == "sdpa"  # a living model's config is left alone
    text._attn_implementation = "eager"
    where, layers = decoder_layers(model)
    counted, outputs = count(model, **batch, use_cache=True, logits_to_keep=1)
    flops = prefill_flops(dims, n_text, n_visual, attention="full")
    assert [counted[f"{where}.{i}"] for i in range(len(layers))] == [x.total for x in flops.layers]
    for i, layer in enumerate(flops.layers):
        assert counted[f"{where}.{i}.self_attn"] == layer.projections + layer.scores
    cache = cache_of(outputs)
    assert held_bytes(cache) == kv_bytes(dims, n_text, n_visual, dtype=torch.float32)
    more = {"input_ids": torch.full((1, 1), 40), CACHE: cache}
    counted, _ = count(model, **more, use_cache=True)
    read = decode_flops(dims, n_text, n_visual) - 2 * (dims.inputs + dims.lm_head)
    assert sum(counted[f"{where}.{i}"] for i in range(len(layers))) == read
    held = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    assert sum(layer.weights(batch=1000) for layer in dims.layers) == held


def test_counting_does_not_depend_on_where_it_is_asked_for() -> None:
    """The engine asks in the middle of a forward pass, under whatever the caller has set."""
    config = FAMILIES["emu3"].make_config()
    dims = TextDims.from_config(config)
    for around in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        meta._counted.clear()
        with around:
            assert TextDims.from_config(config) == dims


@pytest.mark.parametrize("name", [*DESCRIBED, *OTHERS])
def test_the_closed_form_is_what_is_counted(name: str) -> None:
    if name == "gemma4_per_layer":
        pytest.skip("its inputs to each layer need token ids")
    make = FAMILIES[name].make_config if name in FAMILIES else OTHERS[name]
    config = make()
    family = config_family(config)
    counted = meta.counted(family, config)
    assert decoders.closed_form(config, family.lookahead) == counted
    assert meta.counted(family, make()) is counted  # once for all configs that are alike


COUNTED_TOWERS = [
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "got_ocr2",
    "janus",
    "ovis2",
    "qianfan_ocr",
    "vipllava",
]


@pytest.mark.parametrize("name", [name for name in COUNTED_TOWERS if name in FAMILIES])
def test_counted_towers_cost_what_torch_counts_on_the_real_model(name: str) -> None:
    family, model = build(name)
    model.set_attn_implementation("eager")
    batch = family.inputs(model, [[T(3), I(), T(2), I(), T(2)]])
    pixels = {"pixel_values": batch["pixel_values"]}
    counted, _ = count(model.model, model.model.get_image_features, **pixels, return_dict=True)
    n_visual = int(family.visual_mask(model, batch).sum())
    ours = config_family(model.config)
    with pytest.raises(ValueError, match="no cost model for"):
        ours.tower_dims(model.config)
    assert ours.tower_flops(model.config, n_visual) == counted["Global"]
    assert ours.tower_flops(model.config, n_visual, crops=6) == 3 * counted["Global"]
    (row,) = cost_table(model.config, 5, n_visual, {})
    assert row.vision_tflops == counted["Global"] / 1e12


@pytest.mark.parametrize("name", ["aria", "glm4v", "step3p7"])
def test_towers_whose_cost_is_neither_known_nor_counted(name: str) -> None:
    if name not in FAMILIES:
        pytest.skip("not in this transformers")
    config = FAMILIES[name].make_config()
    with pytest.raises(ValueError, match=r"no cost model for .*vision tower"):
        config_family(config).tower_flops(config, 16)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kimi_k25", "work on more than their own token"),  # it unfolds latent keys at each step
        ("step3p7", "cannot be counted"),  # a loop over the experts that tokens chose
    ],
)
def test_decoders_whose_cost_is_neither_known_nor_counted(name: str, reason: str) -> None:
    if name not in FAMILIES:
        pytest.skip("not in this transformers")
    with pytest.raises(ValueError, match=f"no cost model for the decoder .*{reason}"):
        TextDims.from_config(FAMILIES[name].make_config())
