"""The plug-in's parts that know nothing of vLLM; these run in every environment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from st3.vllm.batch import Batch, Share
from st3.vllm.columns import Columns
from st3.vllm.ledger import Ledger
from st3.vllm.metadata import Tables, without_rows
from st3.vllm.plan import Plan
from st3.vllm.prompt import Prompt


class Range:
    """Of vLLM: where a feature's embeddings stand."""

    def __init__(self, *runs: tuple[int, int]) -> None:
        self.runs = list(runs)

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        return self.runs


def feature(*runs: tuple[int, int], modality: str = "image") -> Any:
    return SimpleNamespace(modality=modality, mm_position=Range(*runs))


def request(name: str, length: int, *features: Any, prompt_logprobs: int | None = None) -> Any:
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=length,
        mm_features=list(features),
        sampling_params=SimpleNamespace(prompt_logprobs=prompt_logprobs),
        skip_reading_prefix_cache=False,
    )


# Plan -----------------------------------------------------------------------------------------


def test_what_is_kept_is_rounded_up_to_whole_blocks() -> None:
    plan = Plan("fastv:layer=2,drop=0.5", 8, 2)
    assert [plan.skipped(layer, 576, 0, 16) for layer in (0, 1, 2, 7)] == [0, 0, 288, 288]
    assert plan.skipped(2, 570, 0, 16) == 272  # 285 would go
    assert plan.skipped(2, 30, 0, 16) == 0


def test_a_group_gives_back_what_none_of_its_layers_needs() -> None:
    plan = Plan("st3:first_layer=1,first_drop=0.5,stride=2,final_keep=0.1,curve=none", 8, 4)
    assert plan.group_skipped(0, 512, 0, 32) == 0  # its first layer keeps all
    assert plan.group_skipped(1, 512, 0, 32) == min(
        plan.skipped(i, 512, 0, 32) for i in range(4, 8)
    )


def test_parts_are_runs_of_layers_that_hold_the_same() -> None:
    plan = Plan("fastv:layer=2,drop=0.5", 8, 4)
    assert [(part.group, part.first, part.end) for part in plan.parts] == [
        (0, 0, 2),
        (0, 2, 4),
        (1, 4, 8),
    ]
    assert plan.parts_of(0) == plan.parts[:2]


@pytest.mark.parametrize(
    ("policy", "layers", "size"),
    [("vtw", 32, 16), ("st3-7b", 32, 4), ("balanced", 32, 2), ("fastv", 32, 4), ("grid", 32, 32)],
)
def test_groups_are_as_large_as_memory_allows(policy: str, layers: int, size: int) -> None:
    plan = Plan.choose(policy, layers)
    assert plan.group_size == size
    shares = plan.schedule.shares
    assert float(sum(shares[::size]) * size) <= 1.1 * float(sum(shares))


def test_annealing_frees_more_with_each_step_and_never_less() -> None:
    plan = Plan("balanced:tau=64", 12, 1)
    by_step = [plan.skipped(5, 576, step, 16) for step in range(100)]
    assert by_step == sorted(by_step)
    assert by_step[0] < by_step[-1]


# Prompt and ledger ------------------------------------------------------------------------------


def test_visual_tokens_are_those_of_images() -> None:
    prompt = Prompt.of(40, [feature((3, 5), (8, 9)), feature((20, 22), modality="audio")])
    assert prompt.runs == ((3, 6), (8, 10))
    assert prompt.positions == [3, 4, 5, 8, 9]
    assert prompt.images == (3, 2)


def test_a_video_is_visual_and_images_side_by_side_are_one_run() -> None:
    video = feature((20, 22), (25, 27), modality="video")
    assert Prompt.of(40, [video, feature((3, 5)), feature((6, 9))]).images == (7, 3, 3)


def test_the_last_token_never_counts_as_visual() -> None:
    assert Prompt.of(10, [feature((4, 9))]).runs == ((4, 9),)
    assert Prompt.of(10, [feature((9, 9))]).runs == ()


def encoded(first: int, number: int, modality: str = "image", **data: torch.Tensor) -> Any:
    """A feature of so many tokens, with what an encoder reads."""
    found = feature((first, first + number - 1), modality=modality)
    found.mm_position.get_num_embeds = lambda: number
    found.data = {name: SimpleNamespace(data=value) for name, value in data.items()}
    return found


IMAGE = encoded(1, 12, image_grid_thw=torch.tensor([1, 6, 8]))
VIDEO = encoded(20, 24, "video", video_grid_thw=torch.tensor([2, 6, 8]))
TILES = encoded(1, 32, pixel_values=torch.empty(2, 3, 64, 64))
FRAMES = encoded(40, 48, "video", pixel_values_videos=torch.empty(3, 3, 64, 64))


@pytest.mark.parametrize(
    ("features", "grids"),
    [
        ([IMAGE], (((3, 4),),)),
        ([VIDEO], (((2, 3, 4),),)),
        ([IMAGE, VIDEO], ()),  # in transformers, too: their order is not in the pixel input
        ([TILES, FRAMES], (((2, 4, 4), (3, 4, 4)),)),
        ([encoded(1, 30, pixel_values=torch.empty(1, 3, 64, 64))], ()),  # no square
        ([encoded(1, 30, image_embeds=torch.empty(30, 8))], ()),  # an encoder elsewhere
    ],
)
def test_grids_are_read_off_what_the_encoder_reads(features: list[Any], grids: Any) -> None:
    assert Prompt.of(100, features).grids_from(features) == grids


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(Plan("fastv:layer=2,drop=0.5", 4, 2), 16)


def test_a_request_computed_in_one_piece_is_trimmed(ledger: Ledger) -> None:
    asked = request("a", 120, feature((4, 103)))
    ledger.admit(asked)
    ledger.asks("a", 0, 120)
    ledger.got("a")
    assert ledger.trims("a")
    assert [ledger.empty_blocks("a", group) for group in (0, 1)] == [0, 3]
    assert asked.skip_reading_prefix_cache
    assert ledger.counters == {
        "requests_trimmed": 1,
        "visual_tokens": 100,
        "visual_tokens_kept": 76,
    }


@pytest.mark.parametrize(
    ("asked", "new", "why"),
    [
        (request("a", 120), 120, "text"),
        (request("a", 120, feature((4, 103))), 64, "chunked"),
        (request("a", 120, feature((4, 20))), 120, "small"),
        (request("a", 120, feature((4, 103)), prompt_logprobs=0), 120, "prompt_logprobs"),
    ],
)
def test_a_request_that_passes_is_counted_once_with_the_reason(
    ledger: Ledger, asked: Any, new: int, why: str
) -> None:
    ledger.admit(asked)
    for _ in range(2):
        ledger.asks("a", 0, new)
        ledger.got("a")
    assert not ledger.trims("a")
    assert ledger.empty_blocks("a", 1) == 0
    assert ledger.counters[f"requests_passed_{why}"] == 1
    assert ledger.counters.get("visual_tokens_kept") == ledger.counters.get("visual_tokens")


def test_a_preempted_request_asks_anew(ledger: Ledger) -> None:
    ledger.admit(request("a", 120, feature((4, 103))))
    ledger.asks("a", 0, 120)
    assert ledger.trims("a")
    ledger.asks("a", 0, 64)
    assert not ledger.trims("a")


def test_text_may_read_the_prefix_cache(ledger: Ledger) -> None:
    asked = request("a", 120)
    ledger.admit(asked)
    assert not asked.skip_reading_prefix_cache


# Rows -----------------------------------------------------------------------------------------


def share(start: int = 0) -> Share:
    return Share(start, 12, 0, Prompt(12, ((2, 10),)), True)


def test_the_best_are_kept_in_their_order_with_all_text() -> None:
    columns = Columns(share().prompt, 14, torch.device("cpu"))
    columns.score = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.9, 0.0, 0.3, 0.4])
    assert columns.keep(3).tolist() == [0, 1, 3, 5, 6, 10, 11, 12, 13]
    assert columns.left[columns.visual].tolist() == [3, 5, 6]
    assert columns.ordinal.tolist() == [1, 3, 4]
    # By rising importance; of equals the earlier is the more important.
    assert columns.left[columns.importance()].tolist() == [5, 6, 3, 0, 1, 10, 11, 12, 13]


def test_rows_leave_and_come_back_as_zeros() -> None:
    plan = Plan("random:like=(fastv:layer=1,drop=0.5)", 2, 1)
    others = Share(0, 1, 7, Prompt(5, ()), False)
    batch = Batch(plan, [others, share(start=1)], block=4)
    hidden = torch.arange(13.0)[:, None].expand(13, 3)
    batch.enter(0, hidden, None)
    left, residual = batch.enter(1, hidden, hidden)
    assert len(left) == 9
    assert residual is not None
    assert batch.positions(torch.arange(13)).tolist() == left[:, 0].tolist()
    back, _ = batch.leave(left, residual)
    assert back.shape == hidden.shape
    kept = left[:, 0].long()
    assert back[kept].equal(left)
    assert back.sum() == left.sum()


@pytest.mark.parametrize(
    "policy",
    ["st3", "balanced", "fastv", "fastv:score=attention-max-detrended", "vtw", "pyramiddrop",
     "keynorm", "grid", "random:like=(fastv:drop=0.75)", "divprune", "cdpruner"],
)  # fmt: skip
def test_a_pass_never_waits_for_the_device(policy: str, request: pytest.FixtureRequest) -> None:
    """Tensors without values raise where the host would read one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from st3.methods.scores import mixed

    # What is kept between calls has values before, and none behind.
    mixed._all_worth.cache_clear()
    request.addfinalizer(mixed._all_worth.cache_clear)

    plan = Plan.choose(policy, 8)
    prompt = Prompt(600, ((4, 580),), grids=(((24, 24),),))
    shares = [Share(0, 1, 7, Prompt(5, ()), False), Share(1, 600, 0, prompt, True)]
    with FakeTensorMode():
        batch = Batch(plan, shares, block=16)
        hidden, residual = torch.empty(601, 64), torch.empty(601, 64)
        positions = torch.empty(3, 601, dtype=torch.long)
        for layer in range(8):
            hidden, residual = batch.enter(layer, hidden, residual)  # type: ignore[assignment]
            rows = len(hidden)
            assert rows == 601 - shares[1].dropped(plan, layer, 16)
            assert batch.positions(positions).shape == (3, rows)
            query, key = torch.empty(rows, 4, 16), torch.empty(rows, 2, 16)
            batch.attended(layer, query, key, 0.25, None)
            if batch.orders(layer):
                ((_, slots),) = batch.reorder(torch.empty(rows, dtype=torch.long))
                assert len(slots) == rows - 1
        assert len(batch.leave(hidden)[0]) == 601


# Metadata ---------------------------------------------------------------------------------------


class Common:
    """What of vLLM's ``CommonAttentionMetadata`` is read."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def replace(self, **values: Any) -> Common:
        return Common(**{**self.__dict__, **values})


def common(lengths: list[int], queries: list[int], width: int = 6) -> Common:
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    table = torch.arange(1, 1 + len(lengths) * width).view(len(lengths), width).int()
    return Common(
        block_table_tensor=table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        slot_mapping=torch.arange(sum(queries)) + 1000,
        max_seq_len=max(lengths),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
    )


@pytest.mark.parametrize("fixed", [False, True])
def test_a_trimmed_request_is_a_shorter_one_to_the_kernel(fixed: bool) -> None:
    tables = Tables(4, torch.device("cpu"))
    tables.fixed = fixed  # as on a GPU, where CUDA graphs read the buffers
    moved = tables.past(common([20, 9], [1, 1]), [8, 0], block=4)
    assert moved.block_table_tensor[0, :4].tolist() == [3, 4, 5, 6]
    assert moved.block_table_tensor[1].tolist() == [7, 8, 9, 10, 11, 12]
    assert moved.seq_lens.tolist() == [12, 9]
    assert moved.seq_lens_cpu_upper_bound.tolist() == [12, 9]
    assert moved.max_seq_len == 12


def test_buffers_keep_their_place() -> None:
    """A CUDA graph that was captured with one batch reads the next one's tables."""
    tables = Tables(4, torch.device("cpu"))
    tables.fixed = True
    captured = tables.past(common([20, 9, 1], [1, 1, 1]), [], block=4)
    replayed = tables.past(common([24, 12], [1, 1]), [16, 4], block=4)
    for name in ("block_table_tensor", "seq_lens"):
        assert getattr(captured, name).data_ptr() == getattr(replayed, name).data_ptr()
    assert captured.seq_lens[:2].tolist() == [8, 8]


def test_padded_requests_stay_empty() -> None:
    tables = Tables(4, torch.device("cpu"))
    moved = tables.past(common([20, 0], [1, 0]), [8], block=4)
    assert moved.seq_lens.tolist() == [12, 0]


def test_kept_rows_take_the_last_slots_of_their_prompt() -> None:
    plan = Plan("random:like=(fastv:layer=1,drop=0.5)", 2, 1)
    batch = Batch(plan, [Share(0, 1, 7, Prompt(5, ()), False), share(start=1)], block=4)
    whole = common([8, 12], [1, 12])
    assert without_rows(whole, batch, plan.parts[0]) is whole
    rows = without_rows(whole, batch, plan.parts[1])
    assert rows.query_start_loc.tolist() == [0, 1, 9]
    assert rows.slot_mapping.tolist() == [1000, *range(1005, 1013)]
    assert (rows.num_actual_tokens, rows.max_query_len) == (9, 8)
    assert batch.slots[1] is rows.slot_mapping
