"""Models with adapters of peft, and with quantised weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import st3
from st3.methods.scores.looks import Look
from st3.models import base_model, family_of, find_parts
from tests.helpers import ST3
from tests.zoo import I, T, build

# peft asks transformers for what it will remove.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ROWS = [[T(5), I(), T(4)], [T(3), I(), T(6)]]
TOKENS = {"max_new_tokens": 6, "do_sample": False}


def with_adapter(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A PeftModel whose adapter changes what the model says, its base and a batch."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    family, model = build(name)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    batch = family.inputs(model, ROWS)
    return peft.get_peft_model(model, config).eval(), model, batch


def scored(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(**batch, **TOKENS, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


def test_a_peft_model_is_found_inside_its_wrapper() -> None:
    wrapped, model, _ = with_adapter("llava")
    assert base_model(wrapped) is model
    assert base_model(model) is model
    assert family_of(wrapped) is family_of(model)
    assert find_parts(wrapped) == find_parts(model)
    family = family_of(wrapped)
    tap = family.tower(wrapped, family.parts(wrapped), (Look(),))
    assert tap.inner is model.model


PYRAMID = "st3:first_layer=2,stride=2,final_keep=0.1,tau=8"


@pytest.mark.parametrize(
    ("name", "policy"),
    [("llava", PYRAMID), ("qwen2_5_vl", PYRAMID), ("gemma3", PYRAMID), ("llava", "visionzip")],
)
def test_a_trimmed_adapter_is_the_trimmed_merged_model(name: str, policy: str) -> None:
    wrapped, _, batch = with_adapter(name)
    bare = scored(wrapped, batch)
    with st3.trim(wrapped, policy) as trimmer:
        tokens, logits = scored(wrapped, batch)
        assert trimmer.report.kept[0][-1] < trimmer.report.n_visual[0]
    assert all(torch.equal(a, b) for a, b in zip(bare, scored(wrapped, batch), strict=True))
    with wrapped.disable_adapter(), st3.trim(wrapped, policy):
        assert not torch.allclose(scored(wrapped, batch)[1][0], logits[0], atol=1e-2)
    merged = wrapped.merge_and_unload()
    with st3.trim(merged, policy):
        wanted, its_logits = scored(merged, batch)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, its_logits, atol=1e-4, rtol=1e-4)
    assert (bare[1][0] - logits[0]).abs().max() > 1e-3  # trimming changed something


def test_a_forward_pass_of_a_peft_model() -> None:
    wrapped, _, batch = with_adapter("llava")
    with torch.no_grad(), st3.trim(wrapped, ST3) as trimmer:
        logits = wrapped(**batch).logits
        assert trimmer.report.kept[0][-1] < trimmer.report.n_visual[0]
    merged = wrapped.merge_and_unload()
    with torch.no_grad(), st3.trim(merged, ST3):
        torch.testing.assert_close(logits, merged(**batch).logits, atol=1e-4, rtol=1e-4)


# -- quantised weights --------------------------------------------------------------------------


def by_torch(model: PreTrainedModel) -> Any:
    """torch's own int8, with activations quantised as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao is to take its place
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_torchao(model: PreTrainedModel) -> Any:
    """int8 weights, which is what TorchAoConfig of transformers makes."""
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("quantise", [by_torch, by_torchao])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_quantised_weights_are_trimmed(name: str, quantise: Any) -> None:
    """A policy that drops nothing gives what the bare model gives, up to the rounding of
    activations; one that drops does drop; afterwards the model is as before."""
    family, model = build(name)
    batch = family.inputs(model, ROWS)
    model = quantise(model)
    bare = scored(model, batch)
    with st3.trim(model, st3.NoTrim(), own_cache=True):
        tokens, logits = scored(model, batch)
    assert torch.equal(tokens, bare[0])
    rounding = 0.05 if quantise is by_torch else 1e-4
    assert (logits - bare[1]).abs().max() < rounding * bare[1].abs().max()
    with st3.trim(model, ST3) as trimmer:
        trimmed = scored(model, batch)
        assert trimmer.report.kept[0][-1] < trimmer.report.n_visual[0]
    assert (trimmed[1][0] - bare[1][0]).abs().max() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(bare, scored(model, batch), strict=True))
