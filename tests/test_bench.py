"""The benchmark measures what it says. Nothing here depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import st3
from st3.cost import TextDims, kv_bytes
from st3.hf.call import CACHE
from st3.models import config_family
from st3.models.tiled import image_size
from st3.tools.bench import (
    GROUPED,
    SHAPES,
    Deadline,
    Subject,
    Workload,
    attached,
    bound,
    capacity,
    clock,
    compare,
    from_folder,
    from_shape,
    models,
    own_cache,
    prompts,
    report,
    run,
    steps_of,
    untouched,
)
from st3.tools.bench import profile as profiling
from st3.tools.bench.bars import Bar
from st3.tools.bench.bars import as_markdown as bars_table
from st3.tools.bench.compiled import compiled_decode
from st3.tools.bench.fastv_official import fastv_official
from st3.tools.bench.measure import Footprint, Generation, WeightsOnly, footprint, generation
from st3.tools.bench.methods import downsample, trimmed
from st3.tools.bench.overhead import (
    MODEL,
    RANGES,
    Stopwatch,
    copying_share,
    observed,
    selection_overhead,
)
from st3.tools.bench.profile import profile_decode, selection_share
from st3.tools.bench.ragged import RaggedRow, against_uniform
from st3.tools.bench.tower import tower
from st3.tools.cli._common import split_policies
from st3.tools.common import memory
from st3.tools.common.load import device_of, dtype_of
from tests.zoo import build as build_family

CPU = torch.device("cpu")
VOCAB = 128  # of the shape "tiny"


@pytest.fixture(scope="module")
def subject() -> Subject:
    return from_shape("tiny", CPU, torch.float32)


def prompt(batch: int = 1, visual: int = 24, text: int = 8, ragged: bool = False) -> prompts.Prompt:
    rows = (prompts.ragged if ragged else prompts.uniform)(batch, visual, text)
    return prompts.build(rows, VOCAB, CPU)


def logits(model: Any, made: prompts.Prompt) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=made.ids, attention_mask=made.mask, logits_to_keep=1)
    return out.logits[:, -1]  # type: ignore[no-any-return]


# -- models -------------------------------------------------------------------------------------


def test_a_shape_gets_random_weights_of_the_wanted_type(subject: Subject) -> None:
    half = from_shape("tiny", CPU, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, weight in subject.model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((weight == 1).all()), name
        elif weight.dim() > 1:
            assert 0.01 < weight.std() < 0.03, name
    assert subject.visual_tokens == SHAPES["tiny"].visual_tokens


def test_parameters_are_counted_without_a_model(subject: Subject) -> None:
    made = sum(p.numel() for p in subject.model.parameters())
    assert models.count_parameters(SHAPES["tiny"]) == made


def test_a_shape_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"tiny needs .* GiB .* smaller shape"):
        from_shape("tiny", CPU, torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_shape("llava-9", CPU, torch.float32), "unknown shape 'llava-9'.*tiny"),
        (lambda: from_folder("no/such", CPU, torch.float32), "config.json"),
        (lambda: dtype_of("int3"), "unknown dtype 'int3'.*bfloat16"),
        (lambda: device_of("toaster"), "toaster"),
        (lambda: Workload(new_tokens=1), "at least 2"),
        (lambda: Workload(repeats=0), "repeats"),
        (lambda: prompts.uniform(0, 8, 8), "batch"),
        (lambda: prompts.ragged(1, 8, 8), "two rows"),
        (lambda: prompt(visual=3, text=1), "text tokens"),
        (lambda: prompts.uniform(1, 3, 8, images=4), "4 images"),
        (lambda: prompts.build([], 8, CPU), "at least one row"),
        (lambda: compare([]), "no policy"),
        (lambda: compare(["st4"]), "unknown policy"),
        (lambda: clock.speed_up([1.0], [1.0, 2.0]), "cannot be paired"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_a_folder_is_measured_like_a_shape(tiny_model: Path) -> None:
    found = from_folder(tiny_model, CPU, torch.float32)
    work = Workload(visual=16, text=8, new_tokens=3, repeats=1)
    result = run(found, work, compare(["fastv"], peers=False))
    assert [len(row.generations) for row in result.rows] == [1, 1, 1]
    assert len(result.tower) == 1  # its vision tower was found, too


# -- prompts ------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 40), st.integers(7, 20))
def test_uniform_prompts_have_the_asked_tokens(b: int, images: int, more: int, text: int) -> None:
    made = prompts.build(prompts.uniform(b, images + more, text, images), 100, CPU)
    assert made.mask is None
    assert made.ids.shape == (b, images + more + text)
    assert made.visual.sum(1).tolist() == [images + more] * b
    assert _runs(made.visual[0]) == images
    assert not made.visual[:, 0].any()  # text stands on both sides
    assert not made.visual[:, -1].any()


def test_ragged_prompts_differ_in_length_and_images() -> None:
    made = prompt(batch=4, visual=40, text=16, ragged=True)
    assert made.mask is not None
    lengths = made.mask.sum(1).tolist()
    assert lengths == [row.length for row in made.rows]
    assert lengths[0] == made.ids.shape[1] == 56  # columns of the uniform batch
    assert len(set(lengths)) == 4
    assert [_runs(row) for row in made.visual] == [1, 2, 3, 1]
    assert made.mask[:, -1].all()  # padding is on the left
    assert not made.visual[made.mask == 0].any()


def _runs(row: torch.Tensor) -> int:
    return int((row[1:] & ~row[:-1]).sum() + row[0])


# -- clock --------------------------------------------------------------------------------------


def test_runs_take_turns_and_their_order_rotates() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name) or name) for name in "ABC"}  # type: ignore[misc]
    results = clock.in_turn(calls, 4)
    assert "".join(seen) == "ABCBCACABABC"
    assert results == {name: [name] * 4 for name in "ABC"}


def test_the_deadline_ends_whole_rounds_behind_the_first() -> None:
    results = clock.in_turn({"A": lambda: 1, "B": lambda: 2}, 5, deadline=Deadline(0))
    assert results == {"A": [1], "B": [2]}
    assert Deadline().left == float("inf")


def test_speed_up_by_hand() -> None:
    ratio = clock.speed_up([4.0, 9.0, 8.0], [2.0, 3.0, 2.0])
    assert ratio == clock.Ratio(paired=3.0, minima=2.0, spread=(4 - 2) / 3)
    assert clock.speed_up([], [1.0]) is None


def test_a_stopwatch_gives_time_to_the_innermost_function(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr("st3.tools.bench.overhead.time.perf_counter", lambda: next(times))
    watch = Stopwatch()
    with watch.span("outer"), watch.span("inner"):
        pass
    assert watch.seconds == {"outer": 1.0 + 2.0, "inner": 3.0}


# -- methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("st3", ["st3"]),
        ("st3, fastv:layer=2,drop=0.5,vtw", ["st3", "fastv:layer=2,drop=0.5", "vtw"]),
        (
            "random:like=(fastv:layer=3,drop=0.25),seed=1,none",
            ["random:like=(fastv:layer=3,drop=0.25),seed=1", "none"],
        ),
        ("", []),
    ],
)
def test_policies_are_split_at_the_right_commas(text: str, parts: list[str]) -> None:
    assert split_policies(text) == parts


def test_the_peers_are_always_beside() -> None:
    labels = [method.label for method in compare(["fastv:drop=0.75"])]
    assert labels == [
        "untouched",
        "untrimmed, st3's cache",
        "fastv:drop=0.75",
        "fastv:drop=0.75 (authors' way)",
        "random:like=(fastv:drop=0.75)",
        "fastv",
        "fastv (authors' way)",
        "vtw",
        "downsample",
    ]
    assert "downsample" not in [m.label for m in compare(["none"])]
    assert [m.label for m in compare(["balanced", "balanced"], peers=False)][2:] == ["balanced"]


def test_downsampling_gets_the_mean_share_of_the_visual_tokens(subject: Subject) -> None:
    work = Workload(visual=40, text=8, images=2, new_tokens=2, repeats=1)
    policy = st3.parse("fastv:layer=1,drop=0.5")
    methods = [untouched(), trimmed(policy), downsample(policy)]
    result = run(subject, work, methods)
    layers = subject.model.config.get_text_config(decoder=True).num_hidden_layers
    share = policy.schedule(layers).mean_share
    whole, _, small = result.rows
    assert whole.footprint is not None
    assert small.footprint is not None
    tokens = 8 + 2 * round(20 * share)
    assert small.footprint.kv_live[0] / whole.footprint.kv_live[0] == pytest.approx(tokens / 48)
    assert small.flops_ratio is not None
    assert small.flops_ratio > 1
    assert small.policy == "none"


@pytest.mark.parametrize("method", [own_cache(), attached()], ids=lambda m: m.label)
def test_references_change_no_output(subject: Subject, method: Any) -> None:
    made = prompt(batch=2)
    bare = logits(subject.model, made)
    with method.attach(subject.model, made):
        torch.testing.assert_close(logits(subject.model, made), bare, rtol=0, atol=1e-5)


# -- FastV as its authors do it --------------------------------------------------------------------


def chosen_tokens(model: Any, made: prompts.Prompt, tokens: int = 6) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        input_ids=made.ids, attention_mask=made.mask, max_new_tokens=tokens
    )
    return out[:, -tokens:]


@pytest.mark.parametrize(("layer", "drop"), [(2, 0.5), (1, 0.75), (7, 0.25)])
def test_the_authors_fastv_computes_what_ours_does(
    subject: Subject, layer: int, drop: float
) -> None:
    made = prompt(visual=24)
    with st3.trim(subject.model, st3.FastV(layer, drop), visual_mask=made.visual):
        ours, our_tokens = logits(subject.model, made), chosen_tokens(subject.model, made)
    bare = logits(subject.model, made)
    with fastv_official(subject.model, made.visual, layer, drop):
        theirs, their_tokens = logits(subject.model, made), chosen_tokens(subject.model, made)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert torch.equal(their_tokens, our_tokens)
    assert not torch.allclose(theirs, bare, atol=1e-4)  # something was dropped


def test_the_authors_fastv_takes_row_0s_tokens_for_all_rows(subject: Subject) -> None:
    made = prompt(batch=2)
    alone = dataclasses.replace(made, ids=made.ids[1:], visual=made.visual[1:])
    with fastv_official(subject.model, made.visual):
        both = logits(subject.model, made)
        assert not torch.allclose(both[1:], logits(subject.model, alone), atol=1e-5)


def test_the_authors_fastv_leaves_the_model_as_it_was(subject: Subject) -> None:
    made = prompt()
    before = logits(subject.model, made)
    with fastv_official(subject.model, made.visual):
        assert not torch.equal(logits(subject.model, made), before)
    with pytest.raises(ValueError, match="8 visual"), fastv_official(subject.model, made.visual):
        raise ValueError("8 visual tokens are too few")
    assert torch.equal(logits(subject.model, made), before)
    text = subject.model.model.language_model
    assert text.config._attn_implementation == "sdpa"
    assert not any(layer._forward_pre_hooks for layer in text.layers)


def test_the_authors_fastv_refuses_what_it_cannot_do(subject: Subject) -> None:
    with (
        pytest.raises(ValueError, match="between 1 and 7"),
        fastv_official(subject.model, prompt().visual, layer=8),
    ):
        pass
    mixed = prompt(batch=2, text=16, ragged=True)
    with (
        pytest.raises(ValueError, match="equal rows"),
        fastv_official(subject.model, mixed.visual),
    ):
        pass


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


def test_copying_of_buffers_is_a_part_of_the_steps(subject: Subject) -> None:
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


# -- a whole workload -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(subject: Subject) -> Any:
    with _small_bandwidth():
        work = Workload(batch=2, visual=24, text=8, new_tokens=4, repeats=2)
        steps: list[str] = []
        methods = [*compare(["balanced"]), attached()]
        made = run(subject, work, methods, steps.append)
        assert len(steps) == steps_of(work, methods)
        return made


@contextmanager
def _small_bandwidth() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bound._BYTES, "cpu", 1 << 20)
        yield


def test_every_method_has_every_sample(result: Any) -> None:
    assert [row.label for row in result.rows] == [
        *(m.label for m in compare(["balanced"])),
        attached().label,
    ]
    for row in result.rows:
        assert len(row.prefill) == len(row.generations) == len(row.tpot) == 2
        assert all(len(g.steps) == 3 for g in row.generations)
        assert (row.overhead is not None) == (row.label in ("balanced", "random", "fastv", "vtw"))


def test_summaries_follow_from_the_samples(result: Any) -> None:
    base, trimmed = result.rows[0], result.rows[2]
    figures = report.summary(result, trimmed)
    tower_time = statistics.median(result.tower)
    ttft = tower_time + statistics.median(trimmed.first)
    assert figures["ttft_s"] == pytest.approx(ttft)
    pairs = [a / b for a, b in zip(base.prefill, trimmed.prefill, strict=True)]
    gain = figures["speed_up"]["prefill"]["paired"]
    assert gain == pytest.approx(statistics.median(pairs))
    assert figures["prefill_speed_up_over_flops_ratio"] == pytest.approx(gain / trimmed.flops_ratio)
    total = tower_time + statistics.median(g.total for g in trimmed.generations)
    assert figures["tokens_per_s"] == pytest.approx(2 * 4 / total)
    live = sum(trimmed.footprint.kv_live) / sum(base.footprint.kv_live)
    assert figures["kv_live_ratio"] == pytest.approx(live)
    assert live < 1
    assert report.summary(result, base)["kv_live_ratio"] == 1


def test_what_trimming_gains_is_told_from_what_the_cache_gains(result: Any) -> None:
    base, cache, trimmed = result.rows[:3]
    assert result.own_cache is cache
    alone = report.summary(result, trimmed)["by_trimming"]["total"]["paired"]
    tower = statistics.median(result.tower)
    pairs = [
        (tower + a.total) / (tower + b.total)
        for a, b in zip(cache.generations, trimmed.generations, strict=True)
    ]
    assert alone == pytest.approx(statistics.median(pairs))
    for other in (base, cache, result.rows[-1]):  # nothing is trimmed there
        assert set(report.summary(result, other)["by_trimming"].values()) == {None}


def test_flops_ratios_are_the_reports(subject: Subject, result: Any) -> None:
    made = prompt(batch=2)
    for row, method in zip(result.rows, compare(["balanced"]), strict=False):
        with method.attach(subject.model, made) as trimmer:
            logits(subject.model, made)
        if isinstance(trimmer, st3.Trimmer):
            assert row.flops_ratio == pytest.approx(1 / trimmer.report.prefill_flops_ratio)


def test_results_become_json_and_markdown(result: Any) -> None:
    where = report_conditions()
    data = json.loads(json.dumps(report.to_dict([result], where)))
    assert data["workloads"][0]["rows"][2]["summary"]["flops_ratio"] > 1
    assert len(data["workloads"][0]["rows"][2]["generations"][0]["steps"]) == 3
    page = report.as_markdown([result], where, "a title")
    for row in result.rows:
        assert page.count(f"| {row.label} |") == (2 if row.policy == "none" else 3)
    for column in ("prefill, ms", "TTFT, ms", "TPOT, ms", "tokens/s", "KV allocated", "/ FLOPs"):
        assert column in page
    assert torch.__version__ in page


def report_conditions() -> dict[str, Any]:
    from st3.tools.common.conditions import conditions

    return conditions(CPU, torch.float32)


def test_pictures_are_drawn_with_one_look_for_each_method(result: Any, tmp_path: Path) -> None:
    from PIL import Image

    from st3.tools.bench.plot import draw
    from st3.tools.common.palette import looks

    target = tmp_path / "bench.png"
    draw(result, target, "somewhere")
    assert Image.open(target).size[0] > 1000
    labels = [row.label for row in result.rows]
    varied = "balanced:stride=2"
    chosen = looks([*labels, varied, "divprune"])
    assert len(set(chosen.values())) == len(chosen)
    assert looks(["balanced"])["balanced"] == chosen["balanced"] == looks([varied])[varied]


def test_drawing_without_matplotlib_names_the_remedy(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from st3.tools.bench.plot import draw

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"st3\[plot\]"):
        draw(result, tmp_path / "bench.png", "somewhere")


def test_prefill_alone_and_generation_alone(subject: Subject) -> None:
    work = Workload(visual=24, text=8, new_tokens=0, repeats=1)
    alone = run(subject, work, [untouched()])
    assert len(alone.rows[0].prefill) == 1
    assert not alone.rows[0].generations
    assert "TTFT" not in " ".join(report.cells(alone, report.TIMES)[0])
    work = dataclasses.replace(work, new_tokens=3)
    decode = run(subject, work, [untouched()], bandwidth=1e9, prefills=False)
    assert not decode.rows[0].prefill
    assert decode.bandwidth == 1e9
    assert "prefill, ms" not in report.cells(decode, report.TIMES)[0]


def test_a_ragged_workload_leaves_out_what_needs_equal_rows(subject: Subject) -> None:
    work = Workload(batch=2, visual=24, text=16, new_tokens=0, ragged=True, repeats=1)
    found = run(subject, work, compare(["fastv"]))
    labels = [row.label for row in found.rows]
    assert "fastv" in labels
    assert "fastv (authors' way)" not in labels


def test_policies_that_do_not_fit_are_refused(subject: Subject) -> None:
    work = Workload(visual=24, text=8, new_tokens=0, repeats=1)
    with pytest.raises(ValueError, match="layer=99"):
        run(subject, work, compare(["fastv:layer=99"], peers=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm"])
def test_other_families_are_measured(name: str) -> None:
    _, model = build_family(name)
    model.generation_config = endless()
    work = Workload(batch=2, visual=16, text=8, new_tokens=3, repeats=1)
    methods = [*compare(["fastv:layer=1"], peers=False), attached()]
    found = run(Subject(name, model.eval(), 16), work, methods, bandwidth=1e9)
    assert found.rows[2].label == "fastv:layer=1"
    live = [row.footprint.kv_live[0] for row in found.rows if row.footprint]
    assert live[0] == live[3]
    assert live[0] <= live[1]  # DynamicCache evicts what lies behind a sliding window
    assert live[2] < live[1]


def endless() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=None, pad_token_id=0)


def test_ragged_against_uniform(subject: Subject) -> None:
    work = Workload(batch=2, visual=24, text=16, new_tokens=3, repeats=2)
    (row,) = against_uniform(subject, work, [untouched()])
    assert len(row.ragged) == len(row.uniform) == 2
    made = RaggedRow(
        "x", [Generation(1.0, (), 2.0), Generation(2.0, (), 4.0)], [Generation(3.0, (), 3.0)] * 2
    )
    assert made.slower("first") == (3.0 + 1.5) / 2
    assert made.slower("total") == (1.5 + 0.75) / 2


# -- capacity -----------------------------------------------------------------------------------


@given(st.integers(0, 700), st.integers(1, 900), st.integers(1, 600))
def test_the_largest_batch_is_found_from_any_guess(truth: int, guess: int, limit: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        assert 1 <= batch <= limit
        tried.append(batch)
        return batch <= truth

    found = capacity.largest_batch(fits, guess, limit)
    best = min(truth, limit)
    assert found <= best
    assert best - found <= max(0, 0.03 * found)
    assert len(tried) == len(set(tried)) <= 16


def test_a_good_guess_needs_few_probes() -> None:
    tried: list[int] = []
    found = capacity.largest_batch(lambda b: tried.append(b) or b <= 310, 300)  # type: ignore[func-returns-value]
    assert 300 <= found <= 310
    assert len(tried) <= 5
    assert capacity.largest_batch(lambda b: b <= 310, 300, deadline=Deadline(0)) == 300


def test_trimmed_rows_are_predicted_to_be_smaller(subject: Subject) -> None:
    work = Workload(visual=600, text=8, new_tokens=16)
    sizes = [capacity.row_bytes(subject, work, m) for m in compare(["balanced"], peers=False)]
    dims = TextDims.from_config(subject.model.config)
    assert sizes[0] > kv_bytes(dims, 8, 600, None, 15, "float32")
    assert sizes[2] < sizes[0]


@pytest.mark.slow
def test_batches_that_do_not_fit_are_backed_off(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capacity.generation

    def short_of_memory(model: Any, made: prompts.Prompt, tokens: int) -> Generation:
        if made.batch > 5:
            raise torch.OutOfMemoryError("no")
        return real(model, made, tokens)

    monkeypatch.setattr(capacity, "generation", short_of_memory)
    work = Workload(visual=16, text=8, new_tokens=3, repeats=2)
    (row,) = capacity.measure_capacity(subject, work, [untouched()], memory=1 << 40, limit=9)
    assert (row.largest, len(row.generations)) == (5, 2)
    total = statistics.median(g.total for g in row.generations)
    assert row.tokens_per_s == pytest.approx(5 * 3 / total)
    assert row.tpot is not None
    monkeypatch.setattr(capacity, "largest_batch", lambda *_, **__: 0)
    with pytest.raises(ValueError, match="not one row fits"):
        capacity.measure_capacity(subject, work, [untouched()], memory=1, limit=9)


@pytest.mark.slow
def test_compiled_decode_is_measured_for_both(subject: Subject) -> None:
    work = Workload(visual=24, text=8, new_tokens=4, repeats=1)
    policies = [st3.NoTrim(), st3.ST3()]
    none, trimmed = compiled_decode(subject, work, policies, {"backend": "eager"})
    assert (none.label, trimmed.label) == ("none", "st3")
    assert trimmed.bytes < none.bytes
    assert none.over_bound(bandwidth=none.bytes / none.tpot) == pytest.approx(1)


def test_goals_are_judged_in_their_direction() -> None:
    goals = [
        Bar("fast", 2.0, 1.5),
        Bar("small", 0.4, 0.3, at_most=True),
        Bar("never run", None, 1.0),
    ]
    assert [goal.met for goal in goals] == [True, False, None]
    page = bars_table(goals)
    assert "| small | 0.4 | at most 0.3 | no |" in page
    assert "not measured" in page


# -- commands -----------------------------------------------------------------------------------


def cli(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from st3.tools.cli import app

    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.slow
def test_st3_bench_writes_tables_and_files(tmp_path: Path) -> None:
    with _small_bandwidth():
        done = cli(
            "--shape", "tiny", "--policies", "fastv:layer=2,drop=0.75", "--no-peers", "--batch",
            "1,2", "--new-tokens", 3, "--repeats", 1, "--dtype", "float32", "--out", tmp_path,
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "fastv:drop=0.75" in done.stdout
    assert "load average" in " ".join(done.stdout.split())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "tiny-cpu-float32-tiny-b1-v16-n3.png",
        "tiny-cpu-float32-tiny-b2-v16-n3.png",
        "tiny-cpu-float32.json",
        "tiny-cpu-float32.md",
    ]
    data = json.loads((tmp_path / "tiny-cpu-float32.json").read_text())
    assert [w["workload"]["batch"] for w in data["workloads"]] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--shape", "tiny", "--model", "."), ("--model", "--shape")),
        (("--shape", "nope"), ("nope", "llava-1.5-7b")),
        (("--model", "no/such"), ("no/such", "config.json")),
        (("--batch", "1,x"), ("--batch 1,x",)),
        (("--batch", "0"), ("--batch 0",)),
        (("--shape", "tiny", "--policies", "st4"), ("st4",)),
        (("--shape", "tiny", "--policies", ""), ("no policy",)),
        (("--shape", "tiny", "--policies", "fastv:layer=99"), ("layer=99",)),
        (("--shape", "tiny", "--device", "toaster"), ("toaster",)),
        (("--shape", "tiny", "--dtype", "int3"), ("int3",)),
        (("--shape", "tiny", "--new-tokens", "1"), ("at least 2",)),
        (("--shape", "tiny", "--ragged"), ("two rows",)),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


# -- scripts ------------------------------------------------------------------------------------

TINY = ("--shape", "tiny", "--repeats", "1", "--no-plots", "--out")


@pytest.mark.slow
def test_the_cpu_table_is_written_with_its_goals(tmp_path: Path) -> None:
    from benchmarks import cpu

    with _small_bandwidth():
        cpu.main(
            [
                *("--quick", "--sections", "decode", "caption", "ragged", "--visual", "12"),
                *("--caption-tokens", "3", "--dtypes", "float32", *TINY, str(tmp_path)),
            ]
        )
    page = (tmp_path / "cpu-quick-decode-caption-ragged.md").read_text()
    assert "## Goals" in page
    assert "| kv_live, mean over untrimmed: balanced:first_drop=0.87," in page
    assert "## Ragged against uniform" in page
    goals = tmp_path / "cpu-quick-decode-caption-ragged-goals.json"
    assert all(goal["measured"] is not None for goal in json.loads(goals.read_text())["goals"])


@pytest.mark.slow
def test_the_cpu_table_has_rows_of_grouped_queries(tmp_path: Path) -> None:
    from benchmarks import cpu

    with _small_bandwidth():
        cpu.main(
            [
                *("--quick", "--sections", "grouped", "--grouped-shapes", "tiny", "--visual", "12"),
                *("--dtypes", "float32", *TINY, str(tmp_path)),
            ]
        )
    goals = json.loads((tmp_path / "cpu-quick-grouped-goals.json").read_text())["goals"]
    name = "decode step / untouched: balanced, tiny"
    steps = [(g["goal"], g["at_most"]) for g in goals if g["name"].startswith(name)]
    assert steps == [(1.0, True)]
    assert all(goal["measured"] is not None for goal in goals)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_shapes_share_keys_among_query_heads(name: str) -> None:
    config = SHAPES[name].config
    text = config.text_config
    assert text.num_attention_heads % text.num_key_value_heads == 0
    assert text.num_attention_heads >= 4 * text.num_key_value_heads
    assert 200e6 < models.count_parameters(SHAPES[name]) < 320e6


@pytest.mark.slow
def test_two_checkouts_are_compared_in_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here this one with itself."""
    from benchmarks import old_new

    old_new.main(
        [
            *("--old", str(old_new.ROOT), "--shapes", "tiny", "--dtypes", "float32", "--lengths"),
            *("48", "--batches", "2", "--rounds", "2", "--steps", "2", "--clock", "cpu", "--out"),
            str(tmp_path / "rows.json"),
        ]
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"].split(":")[0] for row in rows] == ["prefill", "decode step, batch 2"] * 3
    assert all(row["same"] and row["low"] <= row["high"] and row["turns"] == 2 for row in rows)
    assert "| old / new |" in capsys.readouterr().out


def test_what_a_checkout_cannot_do_is_one_line(tmp_path: Path) -> None:
    from benchmarks import old_new

    with pytest.raises(SystemExit, match=r"no st3 in .*: give the folder of a checkout"):
        old_new.main(["--old", str(tmp_path)])


def test_the_ratio_is_of_medians_and_the_spread_of_turns() -> None:
    from benchmarks import old_new

    found = old_new.compare([[2.0, 2.0], [4.0], [6.0]], [[1.0], [4.0], [2.0, 2.0]])
    assert (found["old_s"], found["new_s"], found["ratio"]) == (3.0, 2.0, 1.5)
    assert (found["low"], found["high"]) == (1.0, 3.0)


def test_pairs_of_processes_are_one_row_that_says_how_they_differ() -> None:
    from benchmarks import old_new

    first = [("step", True, [[2.0], [2.0]], [[1.0], [1.0]])]
    second = [("step", False, [[3.0], [3.0]], [[3.0], [3.0]])]
    (row,) = old_new.merge([first, second])
    assert row["processes"] == [2.0, 1.0]
    assert (row["ratio"], row["turns"], row["same"]) == (2.5 / 2.0, 4, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "kind", "content"),
    [
        (1, "latency", "| fastv (authors' way) |"),
        (5, "throughput", "largest batch"),
    ],
)
def test_gpu_parts_run_on_a_cpu(part: int, kind: str, content: str, tmp_path: Path) -> None:
    from benchmarks import gpu

    with _small_bandwidth():
        gpu.main(
            [
                *("--part", str(part), "--device", "cpu", "--batch", "1", "--new-tokens", "3"),
                *("--limit", "2", *TINY, str(tmp_path)),
            ]
        )
    assert content in (tmp_path / f"gpu-tiny-{kind}.md").read_text()
    assert json.loads((tmp_path / f"gpu-tiny-{kind}.json").read_text())["conditions"]


def test_gpu_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import gpu

    gpu.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.PARTS) == 12
    assert lines[0].split() == ["1", "latency", "llava-1.5-7b"]


def test_a_part_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import gpu

    with pytest.raises(SystemExit) as stop:
        gpu.main(["--part", "1", "--device", "toaster"])
    assert stop.value.code == 2
    assert "toaster" in capsys.readouterr().err
