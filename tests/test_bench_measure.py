"""The benchmark's measures: of a prefill, of decode steps, of the tower, of st3's own part."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import st3
from st3.cost import TextDims, kv_bytes
from st3.engine.kv.buffer import KVBuffer
from st3.hf.call import CACHE
from st3.models import config_family
from st3.models.tiled import image_size
from st3.tools.bench import (
    SHAPES,
    Subject,
    bound,
    compare,
    from_shape,
    own_cache,
    prompts,
    untouched,
)
from st3.tools.bench import profile as profiling
from st3.tools.bench.measure import Footprint, WeightsOnly, footprint, generation
from st3.tools.bench.overhead import (
    MODEL,
    RANGES,
    Stopwatch,
    copying_share,
    observed,
    selection_overhead,
)
from st3.tools.bench.profile import profile_decode, selection_share
from st3.tools.bench.tower import tower
from st3.tools.common import memory
from tests.benching import CPU, chosen_tokens, logits, prompt
from tests.zoo import build as build_family

# -- measuring ----------------------------------------------------------------------------------


def test_a_generation_has_the_asked_length(subject: Subject) -> None:
    result = generation(subject.model, prompt(batch=2), 5)
    assert len(result.steps) == 4
    assert result.total >= result.first + sum(result.steps)


def test_a_model_that_stops_early_is_refused() -> None:
    eager = from_shape("tiny", CPU, torch.float32)
    first = int(chosen_tokens(eager.model, prompt(), 2)[0, 0])
    eager.model.generation_config.eos_token_id = first
    with pytest.raises(ValueError, match="eos_token_id"):
        generation(eager.model, prompt(), 5)


def test_kv_bytes_are_those_of_the_cost_model(subject: Subject) -> None:
    made, dims = prompt(batch=2), TextDims.from_config(subject.model.config)
    policy = st3.ST3(anneal=st3.Anneal(tau=6))
    spare = WeightsOnly(subject.model, 2)
    for schedule, context in (
        (None, nullcontext()),
        (policy.schedule(8), st3.trim(subject.model, policy, visual_mask=made.visual)),
    ):
        with context:
            held = footprint(subject.model, made, 6, spare)
        live = [2 * kv_bytes(dims, 8, 24, schedule, step, "float32") for step in range(6)]
        assert list(held.kv_live) == live
        assert all(a >= b for a, b in zip(held.kv_allocated, held.kv_live, strict=True))
    assert held.kv_allocated[1] > held.kv_live[1]  # headroom


def test_the_peak_is_what_the_system_tells_above_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, clear = tmp_path / "status", tmp_path / "clear_refs"
    monkeypatch.setattr(memory, "_STATUS", status)
    monkeypatch.setattr(memory, "_CLEAR", clear)
    status.write_text("VmHWM:\t  9999 kB\nVmRSS:\t  1000 kB\n")
    with memory.Peak(CPU) as peak:
        assert clear.read_text() == "5"  # proc(5): resets the peak
        status.write_text("VmHWM:\t  1234 kB\nVmRSS:\t  1100 kB\n")
    assert peak.bytes == 234 << 10
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    with memory.Peak(CPU) as unknown:
        pass
    assert unknown.bytes is None


def test_the_peak_holds_what_was_freed_within() -> None:
    with memory.Peak(CPU) as peak:
        torch.ones(32, 1 << 20)  # 128 MiB, freed at once
    if peak.bytes is None:
        pytest.skip("this system does not tell a process's peak")
    assert peak.bytes > 120 << 20


def test_the_bound_by_hand() -> None:
    # Bounds: 1 + 10 / 10 = 2 and 1 + 30 / 10 = 4; the size after the prefill is not used.
    held = Footprint((999, 10, 30), (0, 0, 0), None, steps=(3.0, 4.0), weights=(1.0, 1.0))
    assert bound.over_bound(held, bandwidth=10.0) == 1.25
    assert bound.over_bound(Footprint((1,), (1,), None), 1.0) is None


def test_the_bandwidth_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bound._BYTES, "cpu", 1 << 20)
    seconds, sums = iter([2.0, 0.5]), []

    def fastest(kernel: Any, device: torch.device, runs: int) -> float:
        assert (device, runs) == (CPU, 7)
        sums.append(float(kernel().sum()))
        return next(seconds)

    monkeypatch.setattr(bound, "_fastest", fastest)
    assert bound.read_bandwidth(CPU, runs=7) == (1 << 20) / 0.5  # of the faster kernel
    assert sums == [1 << 18] * 2  # both have read the whole megabyte


def test_the_fastest_run_behind_an_unmeasured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.1, 3.0, 2.0, 4.0])

    class Marks:
        def __init__(self, device: torch.device) -> None:
            self.marks = 0

        def mark(self) -> None:
            self.marks += 1

        def seconds(self) -> list[float]:
            assert self.marks == 2
            return [next(times)]

    monkeypatch.setattr(bound, "Marks", Marks)
    runs: list[int] = []
    assert bound._fastest(lambda: runs.append(1), CPU, 3) == 2.0
    assert len(runs) == 4


@pytest.mark.parametrize("policy", ["none", "st3"])
def test_a_weights_only_step_before_each_decode_step_changes_nothing(
    subject: Subject, policy: str
) -> None:
    """The model answers as without them, and what they are behind does not grow."""
    made = prompts.build(prompts.uniform(2, 24, 8), subject.vocab, CPU)
    seen: list[int] = []
    tokens: list[torch.Tensor] = []

    def listen(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append(kwargs["input_ids"].shape[1])
        if kwargs[CACHE] is not spare.cache:
            tokens.append(output.logits[:, -1].argmax(-1))

    spare = WeightsOnly(subject.model, 2)
    with st3.trim(subject.model, policy, own_cache=True, visual_mask=made.visual):
        handle = subject.model.register_forward_hook(listen, with_kwargs=True)
        try:
            held = footprint(subject.model, made, 4, spare)
            noted, steps = list(tokens), list(seen)
            tokens.clear()
            generation(subject.model, made, 4)
        finally:
            handle.remove()
    assert steps == [32, 1, 1, 1, 1, 1, 1, 1]
    assert [t.tolist() for t in noted] == [t.tolist() for t in tokens]
    assert len(held.steps) == len(held.weights) == 3
    assert spare.cache.get_seq_length() == 3
    assert min(*held.steps, *held.weights) > 0


# -- the vision tower -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm"]
)
def test_the_tower_gets_pixels_for_the_wanted_tokens(name: str) -> None:
    _, model = build_family(name)
    inputs = config_family(model.config).bench_inputs(model, 16, 2)
    assert inputs is not None
    features = model.get_image_features(**inputs).pooler_output
    assert sum(len(f.flatten(0, -2)) for f in features) == 2 * 16
    look = tower(model, 16, 2)
    assert look is not None
    assert look() > 0


def test_llava_next_gets_an_image_of_as_many_crops() -> None:
    config = SHAPES["llava-next-7b"].config
    assert image_size(config.image_grid_pinpoints, 336, 5) == [672, 672]
    assert image_size(config.image_grid_pinpoints, 336, 99) is None


def test_towers_that_are_not_described_are_left_out() -> None:
    _, model = build_family("aria")
    assert tower(model, 16, 1) is None


# -- st3's own part of the prefill -----------------------------------------------------------------


def test_probing_changes_nothing_and_is_taken_back(subject: Subject) -> None:
    method, made, watch = compare(["balanced"], peers=False)[2], prompt(), Stopwatch()
    with method.attach(subject.model, made):
        expected = logits(subject.model, made)
        with observed(subject.model, watch):
            assert torch.equal(logits(subject.model, made), expected)
        assert set(watch.seconds) == {*RANGES, MODEL}
        seen = dict(watch.seconds)
        assert torch.equal(logits(subject.model, made), expected)
        assert watch.seconds == seen


def test_overhead_is_st3s_alone(subject: Subject) -> None:
    st3_method, fastv, official = compare(["balanced", "fastv"])[2:5]
    found = selection_overhead(subject.model, prompt(), st3_method, runs=1)
    assert found is not None
    assert 0 < found.seconds == sum(found.ranges.values()) < found.prefill
    assert found.share == found.seconds / found.prefill
    assert fastv.own_engine
    assert selection_overhead(subject.model, prompt(), official, runs=1) is None
    assert selection_overhead(subject.model, prompt(), own_cache(), runs=1) is None


def test_copying_of_buffers_is_a_part_of_the_steps(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of so small a model take less than the clock is sure of: here each takes longer."""
    move = KVBuffer.move

    def slow_move(buffer: KVBuffer, first: int, capacity: int) -> None:
        time.sleep(0.002)
        move(buffer, first, capacity)

    monkeypatch.setattr(KVBuffer, "move", slow_move)
    made, method = prompt(), compare(["balanced"], peers=False)[2]
    few = copying_share(subject.model, made, method, 4)  # there is room for a few tokens
    assert 0 < few < copying_share(subject.model, made, method, 24) < 1


@pytest.mark.slow
def test_no_decode_step_waits_for_the_device_more_than_the_bare_model(subject: Subject) -> None:
    made = prompt(batch=2)
    bare, *others = [
        profile_decode(subject.model, made, m, 3, 5) for m in compare(["balanced"], False)
    ]
    assert bare.waits["aten::item"] > 0  # generate() asks whether all rows are finished
    for other in others:
        assert other.waits == bare.waits


def test_the_profilers_share_by_hand(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranges but the score, which lies within the choice, less the model's own work there."""

    def event(name: str, whole: float, own: float) -> Any:
        device = SimpleNamespace(name="CPU")
        return SimpleNamespace(
            key=name, device_type=device, cpu_time_total=whole, self_cpu_time_total=own
        )

    spans = {"begin": 10, "gather": 20, "score": 5, "choose": 30, "finish": 10, "model": 12}
    events = [event(f"st3.{name}", whole, 1) for name, whole in spans.items()]
    events.append(event("aten::mm", 500, 194))
    found = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(profiling, "_profiler", lambda prompt: nullcontext(found))
    share = selection_share(subject.model, prompt(), compare(["balanced"], False)[2])
    assert share == pytest.approx((10 + 20 + 30 + 10 - 12) / 200)


def test_the_profiler_sees_every_range_of_st3_and_none_without_it(subject: Subject) -> None:
    made = prompt()
    assert selection_share(subject.model, made, compare(["balanced"], False)[2]) > 0
    assert selection_share(subject.model, made, untouched()) == 0
