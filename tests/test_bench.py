"""The benchmark measures what it says: models, prompts, the clock, methods. Nothing here depends on
how long anything takes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import st3
from st3.tools.bench import (
    SHAPES,
    Deadline,
    Subject,
    Workload,
    attached,
    clock,
    compare,
    from_folder,
    from_shape,
    models,
    own_cache,
    prompts,
    run,
    untouched,
)
from st3.tools.bench.fastv_official import fastv_official
from st3.tools.bench.methods import downsample, trimmed
from st3.tools.bench.overhead import (
    Stopwatch,
)
from st3.tools.cli._common import split_policies
from st3.tools.common.load import device_of, dtype_of
from tests.benching import CPU, chosen_tokens, logits, prompt

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
