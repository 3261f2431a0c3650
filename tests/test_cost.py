"""The cost model against torch's FlopCounterMode, real masks, real caches and real parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
)

import st3
from st3.cost import (
    TextDims,
    VisionDims,
    decode_flops,
    kv_allocated_bytes,
    kv_bytes,
    prefill_flops,
    vision_flops,
    with_headroom,
)
from st3.engine.kv.layout import capacity_for
from st3.hf.call import CACHE, cache_of
from st3.methods.schedule import Anneal, Schedule
from tests.costs import (
    DESCRIBED,
    OTHERS,
    PYRAMID,
    REQUIRED,
    count,
    decoder_layers,
    head_name,
    held_bytes,
    one_image,
)
from tests.zoo import FAMILIES, I, T, build


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
