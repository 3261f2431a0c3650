"""What a GPU may change: other kernels, other rounding, work that is queued, memory of its own.

The slow reference judges here too. In fp32 it runs on the CPU. In bf16 it runs
beside the engine, and keeps the tokens that the engine kept: two kernels round differently, and so
rank tokens of nearly equal scores differently.

    python -m pytest tests/test_gpu.py                  # on a machine with a GPU
    python -m pytest tests/test_gpu.py --device cpu     # a look at the tests themselves
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import st3
from tests.helpers import METHODS, POLICIES, Case, parts, rows_for
from tests.reference import ReferenceResult, Score, Seen, reference_prefill
from tests.zoo import FAMILIES, I, T

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

NAMES = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm"]
JUDGED = ["st3", "default", "fastv"]
ATTENTION = ["sdpa", "flash_attention_2"]
SOLO = [[T(5), I(), T(4)]]
ON_EACH = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions of the vision towers in whole float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    asked = torch.device(request.config.getoption("--device"))
    if asked.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return asked


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("says something of CUDA alone")
    return device


def four_rows(name: str) -> list[list[Any]]:
    """A ragged batch of four rows, of three where a row needs an image."""
    return [*rows_for(FAMILIES[name]), [T(9), I(), T(12)]]


def moved(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """The case on a device."""
    case.model.to(device, dtype)
    for key, value in case.batch.items():
        if isinstance(value, Tensor):
            kind = dtype if value.is_floating_point() else value.dtype
            case.batch[key] = value.to(device, kind)
    case.visual = case.visual.to(device)
    return case


def near(actual: Tensor, expected: Tensor, share: float) -> None:
    """Within ``share`` of the largest logit."""
    largest = float(expected.abs().max().clamp_min(1))
    torch.testing.assert_close(
        actual.float().cpu(), expected.float().cpu(), rtol=0, atol=share * largest
    )


@pytest.mark.parametrize("policy", JUDGED)
@ON_EACH
def test_float32_is_the_reference(name: str, policy: str, device: torch.device) -> None:
    case, chosen = Case.of(name, four_rows(name)), POLICIES[policy]
    wanted = case.reference_prefill(chosen)
    ids, wanted_logits = case.reference_generate(chosen, 8)
    there = case.valid & wanted.kept[-1]
    moved(case, device)
    logits, report = case.prefill(chosen)
    near(logits[there.to(device)], wanted.logits[there], 1e-4)
    visual = case.visual.cpu()
    for layer, here in enumerate(wanted.kept):
        for row in range(len(visual)):
            kept = here[row][visual[row]].nonzero().flatten()
            assert torch.equal(report.kept_positions(layer, row).cpu(), kept), (layer, row)
    out = case.generate(chosen, 8)
    near(torch.stack(out.logits, 1), wanted_logits, 1e-4)
    assert torch.equal(out.sequences[:, case.width :].cpu(), ids)


def reference_of_kept(case: Case, policy: st3.Policy, report: st3.Report) -> ReferenceResult:
    """The reference's prefill, which keeps the tokens of a report."""
    kept = torch.zeros(case.layers + 1, *case.visual.shape)
    for row in range(len(case.visual)):
        places = case.visual[row].cpu().nonzero().flatten()
        for layer in range(case.layers):
            kept[layer, row, places[report.kept_positions(layer, row).cpu()]] = 1.0

    def of(seen: Seen) -> Tensor:
        return kept[seen.layer + 1].to(seen.kept.device)

    with torch.device(case.model.device):
        return reference_prefill(
            case.model, case.batch, case.schedule(policy), case.visual, score=Score(of)
        )


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("policy", JUDGED)
@ON_EACH
def test_bfloat16_is_the_reference_of_its_choice(
    name: str, policy: str, attention: str, device: torch.device
) -> None:
    if attention != "sdpa" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    chosen = POLICIES[policy]
    exact = Case.of(name, four_rows(name))
    exact_kept = exact.reference_prefill(chosen).kept
    case = moved(exact, device, torch.bfloat16)
    case.model.set_attn_implementation(attention)
    logits, report = case.prefill(chosen)
    assert torch.isfinite(logits).all()
    case.model.set_attn_implementation("sdpa")
    wanted = reference_of_kept(case, chosen, report)
    there = case.valid & wanted.kept[-1]
    near(logits[there], wanted.logits[there], 0.1)
    same = total = 0
    for layer, here in enumerate(exact_kept):
        for row in range(len(case.visual)):
            kept = set(report.kept_positions(layer, row).tolist())
            own = set(here[row][case.visual[row].cpu()].nonzero().flatten().tolist())
            assert len(kept) == len(own)
            same, total = same + len(kept & own), total + len(own)
    assert same >= 0.8 * total  # most are those that exact arithmetic keeps
    out = case.generate(chosen, 8)
    assert all(torch.isfinite(step).all() for step in out.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ON_EACH
def test_a_policy_that_drops_nothing_changes_no_bit(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = moved(Case.of(name, four_rows(name)), device, dtype)
    with torch.no_grad():
        bare = case.model(**case.batch).logits
    assert torch.equal(case.prefill(st3.NoTrim())[0], bare)
    before, after = case.generate(None), case.generate(st3.NoTrim())
    assert torch.equal(before.sequences, after.sequences)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))


@pytest.mark.parametrize("rows", ["solo", "ragged"])
@pytest.mark.parametrize("options", ["graphs", "reduce-overhead"])
def test_compiled_decoding_gives_the_same(options: Any, rows: str, gpu: torch.device) -> None:
    name = "qwen2_5_vl" if options == "graphs" else "llava"
    case = moved(Case.of(name, SOLO if rows == "solo" else four_rows(name)), gpu)
    plain = case.generate(POLICIES["st3"], 24)
    with st3.trim(case.model, POLICIES["st3"], compile_decode=options, decode_bucket=32):
        for _ in range(3):
            out = case.generate(None, 24)
            near(torch.stack(out.logits), torch.stack(plain.logits), 1e-4)
            assert torch.equal(out.sequences, plain.sequences)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", [*JUDGED, "covered", "none"])
def test_memory_comes_back(policy: str, graphs: bool, gpu: torch.device) -> None:
    case = moved(Case.of("llava", four_rows("llava")), gpu)
    chosen = (POLICIES | METHODS)[policy]
    how = "graphs" if graphs else None

    def use() -> int:
        with st3.trim(case.model, chosen, compile_decode=how), torch.no_grad():
            case.generate(None)
            case.model(**case.batch)
        gc.collect()
        return torch.cuda.memory_allocated()

    before = use()  # with what libraries allocate once
    assert use() == before


@contextmanager
def waiting_is_an_error(case: Case) -> Iterator[None]:
    """From the second decoder layer's begin to the last one's end no call waits for the device."""
    _, layers = parts(case.model)
    layers = layers[: case.layers]
    hooks = [
        layers[1].register_forward_pre_hook(lambda *call: torch.cuda.set_sync_debug_mode("error")),
        layers[-1].register_forward_hook(lambda *call: torch.cuda.set_sync_debug_mode("default")),
    ]
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("rows", ["solo", "ragged"])
@pytest.mark.parametrize("policy", [name for name in {**POLICIES, **METHODS} if name != "none"])
def test_no_layer_waits_for_the_device(policy: str, rows: str, gpu: torch.device) -> None:
    name = "llava_next_video" if policy in ("evs", "vidcom2", "dycoke") else "llava"
    batch = SOLO if rows == "solo" else four_rows(name)
    case = moved(Case.of(name, batch), gpu)
    chosen = (POLICIES | METHODS)[policy]
    case.generate(chosen, 6)
    with st3.trim(case.model, chosen), waiting_is_an_error(case):
        case.generate(None, 6)


@pytest.mark.parametrize("policy", [None, "none", "st3"])
def test_trimmed_passes_do_without_kernels_that_are_planned(
    policy: str | None, gpu: torch.device
) -> None:
    """cuDNN's, which a GPU may take first; a model that is not trimmed keeps them."""
    case = moved(Case.of("llava", SOLO), gpu)
    seen: set[bool] = set()
    layer = parts(case.model)[1][1]
    hook = layer.register_forward_hook(
        lambda *call: seen.add(torch.backends.cuda.cudnn_sdp_enabled())
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    case.generate(None if policy is None else POLICIES[policy], 3)
    hook.remove()
    assert seen == {before and policy != "st3"}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
