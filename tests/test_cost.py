"""The cost model against torch's FlopCounterMode, real masks, real caches and real parameters."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

import st3
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
from st3.engine.layout import capacity_for
from st3.hf.call import CACHE, cache_of
from st3.methods.schedule import Anneal, Schedule
from st3.models import config_family, decoders, find_parts, meta
from tests.zoo import FAMILIES, Family, I, T, build
from tests.zoo.base import TEXT

N_TEXT = 30
PYRAMID = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1]


def _llava_on(kind: str, **changes: Any) -> PreTrainedConfig:
    """The zoo's LLaVA with a decoder of another kind."""
    config = FAMILIES["llava"].make_config()
    llama = config.text_config.to_dict()
    shared = {name: llama[name] for name in TEXT if name in llama}
    config.text_config = AutoConfig.for_model(kind, **{**shared, **changes})
    return config


# Decoders that no vision-language family of the zoo has, and mixtures of experts.
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
OTHERS = {
    "phi": lambda: _llava_on("phi", num_key_value_heads=4),
    "starcoder2": lambda: _llava_on("starcoder2", sliding_window=20),
    "phi3": lambda: _llava_on("phi3"),
    "mixtral": lambda: _llava_on("mixtral", num_local_experts=4),
    "qwen2_moe": lambda: _llava_on("qwen2_moe", shared_expert_intermediate_size=28, **EXPERTS),
    "qwen3_moe": lambda: _llava_on(
        "qwen3_moe", mlp_only_layers=[1], decoder_sparse_step=2, **EXPERTS
    ),
}


def model_of(name: str) -> tuple[Family, PreTrainedModel]:
    if name in FAMILIES:
        family, model = build(name)
    else:
        family = replace(FAMILIES["llava"], name=name, make_config=OTHERS[name])
        model = family.model()
    model.set_experts_implementation("eager")  # the counter sees no grouped product
    return family, model


# The families that must be described with their vision tower, and others with a decoder, a mask or
# a cache of another kind.
REQUIRED = [
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "paligemma2",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
]
FURTHER = [
    "aya_vision",
    "exaone4_5",
    "gemma4",
    "gemma4_moe",
    "gemma4_per_layer",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "hunyuan_vl",
    "mistral3_window",
    "molmo2",
    "ovis2",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "video_llama_3",
    "vipllava",
]
DESCRIBED = [*REQUIRED, *(name for name in FURTHER if name in FAMILIES)]  # not all are in 5.16


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the text decoder's layers."""
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder.layers:
            return name, module
    raise AssertionError("the decoder's layers were not found")


def head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def one_image(
    name: str,
    attention: str,
    image: I = I(),  # noqa: B008
) -> tuple[PreTrainedModel, Any, int, int]:
    """A model, its inputs for one image, and how many text and visual tokens they have."""
    family, model = model_of(name)
    if attention == "sdpa" and not all(
        module._supports_sdpa for module in model.modules() if isinstance(module, PreTrainedModel)
    ):
        pytest.skip("transformers has no sdpa for this decoder")
    model.set_attn_implementation(attention)
    batch = family.inputs(model, [[T(N_TEXT - 10), image, T(10)]])
    visual = int(family.visual_mask(model, batch).sum())
    return model, batch, batch["input_ids"].shape[1] - visual, visual


def cpu_sdpa(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """torch counts 0 for the CPU's kernel. The arguments are shapes."""
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def held_bytes(cache: Any) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def count(model: nn.Module, call: Any = None, **inputs: Any) -> tuple[dict[str, int], Any]:
    """FLOPs per module as torch counts them, and the outputs."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: cpu_sdpa})
    model.requires_grad_(False)  # the counter follows gradients
    with torch.no_grad(), counter:
        outputs = (call or model)(**inputs)
    root = type(model).__name__ + "."
    flops = {
        name.removeprefix(root): sum(by_op.values())
        for name, by_op in counter.get_flop_counts().items()
    }
    return flops, outputs


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in [*DESCRIBED, *OTHERS]] + [(name, "sdpa") for name in REQUIRED],
)
def test_untrimmed_flops_and_kv_bytes_are_exactly_the_real_ones(name: str, attention: str) -> None:
    model, batch, n_text, n_visual = one_image(name, attention)
    dims = TextDims.from_config(model.config)
    where, layers = decoder_layers(model)

    counted, outputs = count(model, **batch, use_cache=True, logits_to_keep=1)
    flops = prefill_flops(dims, n_text, n_visual, attention="full")
    assert [counted[f"{where}.{i}"] for i in range(len(layers))] == [x.total for x in flops.layers]
    for i, layer in enumerate(flops.layers):
        assert counted[f"{where}.{i}.self_attn"] == layer.projections + layer.scores
    head = head_name(model)
    positions = [1] if name in REQUIRED else [1, n_text + n_visual]  # some compute all logits
    assert counted[head] in [flops.lm_head * n for n in positions]

    decoder = where.removesuffix(".layers")
    angles = counted.get(f"{decoder}.rotary_emb", 0)  # an outer product that we do not count
    assert counted[decoder] - angles == flops.total - flops.lm_head

    cache = cache_of(outputs)
    assert held_bytes(cache) == kv_bytes(dims, n_text, n_visual, dtype=torch.float32)

    for step in (1, 2):
        more = {"input_ids": torch.full((1, 1), 40), CACHE: cache}
        counted, _ = count(model, **more, use_cache=True)
        angles = counted.get(f"{decoder}.rotary_emb", 0)
        step_flops = counted[decoder] - angles + counted[head]
        assert step_flops == decode_flops(dims, n_text, n_visual, step=step)
        assert held_bytes(cache) == kv_bytes(dims, n_text, n_visual, None, step, torch.float32)


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


@pytest.mark.parametrize("name", [*REQUIRED, *OTHERS])
def test_layers_on_fewer_tokens_are_exactly_those_that_torch_counts(name: str) -> None:
    """Each layer run on the tokens that a schedule leaves it, by plain slicing."""
    model, batch, n_text, n_visual = one_image(name, "eager")
    where, layers = decoder_layers(model)
    schedule = Schedule.from_shares(PYRAMID[: len(layers)])

    def shorten(tokens: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            args = tuple(x[:, :tokens] if isinstance(x, torch.Tensor) else x for x in args)
            kwargs["position_embeddings"] = tuple(
                x[..., :tokens, :] for x in kwargs["position_embeddings"]
            )
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = kwargs["attention_mask"][..., :tokens, :tokens]
            return args, kwargs

        return hook

    for index, layer in enumerate(layers):
        tokens = n_text + schedule.kept(index, n_visual)
        layer.register_forward_pre_hook(shorten(tokens), with_kwargs=True)
    if name.startswith("qwen3_vl"):  # adds features of all visual tokens between layers
        model.get_decoder()._deepstack_process = lambda hidden, *args: hidden
    counted, _ = count(model, **batch, use_cache=False, logits_to_keep=1)
    flops = prefill_flops(
        TextDims.from_config(model.config), n_text, n_visual, schedule, attention="full"
    )
    assert [counted[f"{where}.{i}"] for i in range(len(layers))] == [x.total for x in flops.layers]
    assert (
        flops.total
        < prefill_flops(
            TextDims.from_config(model.config), n_text, n_visual, attention="full"
        ).total
    )


# Molmo 2's row, start and end tokens also see each other both ways; the model counts them as text.
@pytest.mark.parametrize("name", [name for name in DESCRIBED if name != "molmo2"])
@pytest.mark.parametrize("images", [1, 2])
def test_useful_pairs_are_those_that_the_models_mask_allows(name: str, images: int) -> None:
    family, model = build(name)
    if images > 1 and not family.multi_image:
        pytest.skip("one image only")
    model.set_attn_implementation("eager")
    batch = family.inputs(model, [[T(7), *[I(), T(9)] * images]])
    n_visual = int(family.visual_mask(model, batch).sum())
    n_text = batch["input_ids"].shape[1] - n_visual
    _, layers = decoder_layers(model)
    allowed: list[int] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        allowed.append(int((kwargs["attention_mask"] == 0).sum()))

    for layer in layers:
        layer.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    dims = TextDims.from_config(model.config)
    flops = prefill_flops(dims, n_text, n_visual, images=images)
    pairs = [
        layer.scores // (4 * d.heads * d.head_dim)
        for layer, d in zip(flops.layers, dims.layers, strict=True)
    ]
    assert pairs == allowed


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tower_flops_are_exactly_those_that_torch_counts(name: str, attention: str) -> None:
    whole = I(4, 4) if name == "qwen2_5_vl" else I()  # of its attention windows
    model, batch, _, n_visual = one_image(name, attention, whole)
    dims = VisionDims.from_config(model.config)
    counted, _ = count(model, **batch, logits_to_keep=1)
    where, _ = decoder_layers(model)
    decoder = counted[where.removesuffix(".layers")]
    tower = counted[type(model).__name__] - decoder - counted[head_name(model)]
    angles = ("rotary_emb", "rotary_pos_emb", "patch_positional_embedding")  # not ours, as above
    rotary = sum(n for m, n in counted.items() if m.endswith(angles) and where[:-7] not in m)
    crops = batch["pixel_values"].shape[-4] if batch["pixel_values"].dim() >= 4 else None
    assert tower - rotary == vision_flops(dims, n_visual, crops)


def test_siglips_pooling_head_is_counted_where_it_is() -> None:
    config = FAMILIES["paligemma"].make_config()
    config.vision_config.vision_use_head = False
    without = VisionDims.from_config(config)
    config.vision_config.vision_use_head = True
    dims = VisionDims.from_config(config)
    tower = AutoModel.from_config(config.vision_config, attn_implementation="eager")
    side = config.vision_config.image_size
    counted, _ = count(tower, pixel_values=torch.randn(1, 3, side, side))
    head = sum(n for name, n in counted.items() if name in ("head", "vision_model.head"))
    n_visual = (side // config.vision_config.patch_size) ** 2
    assert head == vision_flops(dims, n_visual) - vision_flops(without, n_visual) > 0


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_generate_computes_one_position_of_the_head_per_token(name: str) -> None:
    model, batch, n_text, n_visual = one_image(name, "eager")
    dims = TextDims.from_config(model.config)
    counted, out = count(
        model, model.generate, **batch, max_new_tokens=3, return_dict_in_generate=True
    )
    assert counted[head_name(model)] == 3 * 2 * dims.lm_head
    assert held_bytes(cache_of(out)) == kv_bytes(dims, n_text, n_visual, None, 2, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl_moe"])
def test_a_trimmed_run_costs_what_the_model_says(name: str) -> None:
    policy = st3.ST3(
        first_layer=2, stride=2, final_keep=0.1, anneal=Anneal("linear", tau=30, floor=0.0)
    )
    model, batch, n_text, n_visual = one_image(name, "eager")
    dims = TextDims.from_config(model.config)
    where, layers = decoder_layers(model)
    schedule = policy.schedule(len(layers))
    with st3.trim(model, policy) as trimmer:
        counted, _ = count(model, model.generate, **batch, max_new_tokens=40)

    flops = prefill_flops(dims, n_text, n_visual, schedule)
    assert trimmer.report.prefill_flops == flops.total
    for i, (layer, sizes) in enumerate(zip(flops.layers, dims.layers, strict=True)):
        assert counted[f"{where}.{i}.mlp"] == layer.mlp + 39 * 2 * sizes.mlp
    rule = with_headroom(capacity_for)
    assert [sample.step for sample in trimmer.report.samples] == list(range(40))
    for sample in trimmer.report.samples:
        prompt = (dims, n_text, n_visual, schedule, sample.step, "fp32")
        live = kv_bytes(*prompt, windows=False)
        allocated = kv_allocated_bytes(*prompt, rule=rule, windows=False)
        if any(sizes.window for sizes in dims.layers) and sample.step:
            # Text behind a window is given up; how much depends on where the image stands.
            assert sample.live < live
            assert sample.allocated < allocated
        else:
            assert (sample.live, sample.allocated) == (live, allocated)


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
    # A prompt is filed, with room behind it, when the first further token comes.
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


def test_the_table_stands_without_a_known_tower() -> None:
    config = shape("llava-1.5-7b").config
    config.vision_config.model_type = "something_new"
    assert cost_table(config, 64, 576, {})[0].vision_tflops is None


def test_the_tables_of_the_docs_are_up_to_date() -> None:
    script = Path(__file__).parent.parent / "docs" / "make_cost.py"
    made = runpy.run_path(str(script))
    page = script.with_name("cost.md").read_text(encoding="utf-8")
    assert "| ST3, S = 4 |" in page
    assert made["render"](page) == page, "run: python docs/make_cost.py"


# -- bad input ------------------------------------------------------------------------------


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


def test_shared_kv_layers_are_refused() -> None:
    from transformers import Gemma4TextConfig

    with pytest.raises(ValueError, match="share another layer's KV"):
        TextDims.from_config(Gemma4TextConfig(num_kv_shared_layers=10))


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
