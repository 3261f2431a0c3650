"""Stores of KV entries, on tensors alone: what they take over, what they free, and what they write
where."""

from __future__ import annotations

import copy

import pytest
import torch

import st3
from st3.engine.kv.joined import (
    JoinedSequence,
    JoinedStore,
    SequenceEntries,
    VisibleCounts,
    entries_of,
    plain_entries,
)
from st3.engine.kv.store import KVStore
from st3.engine.kv.timeline import Phase, Timeline
from st3.engine.prompt import read_prompt
from st3.engine.select import select
from st3.methods.schedule import Schedule

WHOLE = Schedule.from_shares([1.0])
HALVING = Schedule.from_shares([1.0], st3.Anneal("linear", tau=4, floor=0))


def pair(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one KV head."""
    return torch.randn(rows, 1, columns, 2), torch.randn(rows, 1, columns, 2)


def admitted(window: int, timeline: Timeline, length: int) -> KVStore:
    """A store that was given a prompt of text of ``length`` tokens."""
    store = KVStore(0, WHOLE, timeline, window)
    _, block = read_prompt(torch.zeros(1, length, dtype=torch.bool), None, 0, per_image=False)
    store.receive(*pair(1, length))
    store.admit(block, None, [()])
    return store


def test_a_turn_of_text_behind_a_window_is_taken_over_with_its_places() -> None:
    """A plain layer with a sliding window holds the turn's last columns alone."""
    store = KVStore(0, WHOLE, Timeline(Phase.PREFILL, tokens=6, prompt=6), window=5)
    store.adopt(*pair(2, 4), [3, 0], 6)
    assert [row.pad for row in store.rows] == [1, 0]
    store.write()
    assert store.positions(0).tolist() == [[2, 3, 4, 5]] * 2


def test_what_is_stored_holds_no_graph() -> None:
    """It would keep all that the prompt's pass computed; nor can such tensors be copied."""
    store = KVStore(0, WHOLE, Timeline(Phase.PREFILL, tokens=3, prompt=3))
    _, block = read_prompt(torch.zeros(1, 3, dtype=torch.bool), None, 0, per_image=False)
    key, value = pair(1, 3)
    store.receive(key.requires_grad_() * 2, value.requires_grad_() * 2)
    store.admit(block, None, [()])
    copy.deepcopy(store)
    assert store.buffer is None
    assert not store.received.key.requires_grad
    assert not store.received.value.requires_grad


def test_a_prompt_is_written_without_what_the_next_token_no_longer_sees() -> None:
    timeline = Timeline(Phase.PREFILL, tokens=10, prompt=10, dense_from=10)
    store = admitted(4, timeline, 10)
    assert store.buffer is None
    timeline.phase = Phase.IDLE
    store.compact()
    assert store.positions(store.filled.base).tolist() == [[7, 8, 9]]


def test_an_image_is_kept_where_text_before_it_has_left_the_window() -> None:
    store = KVStore(0, HALVING, Timeline(Phase.PREFILL, tokens=16, prompt=16, dense_from=16), 8)
    visual = (torch.arange(16) >= 10) & (torch.arange(16) < 14)
    _, block = read_prompt(visual[None], None, 0, per_image=False)
    score = torch.zeros(1, 16)
    score[0, 10:14] = torch.tensor([0.3, 0.1, 0.4, 0.2])
    store.receive(*pair(1, 16))
    store.admit(block, score, [(4,)])
    places = store.write()
    assert places is not None
    assert places.tolist() == [[11, 13, 10, 12, 9, 14, 15]]
    assert store.row_starts(0) == (store.filled.base,)


def test_the_first_token_of_a_turn_under_way_sees_its_whole_window() -> None:
    timeline = Timeline(Phase.PREFILL, tokens=10, prompt=10, dense_from=10)
    store = admitted(4, timeline, 10)
    timeline.phase, timeline.start, timeline.dense_from = Phase.APPEND, 10, 20
    store.write()
    assert store.positions(store.filled.base).tolist() == [[7, 8, 9]]


def with_visual(visual: int, text: int, rows: int = 1, recalls: bool = False) -> KVStore:
    """A store that was given a prompt which is annealed to nothing in four steps."""
    length = visual + text
    timeline = Timeline(Phase.PREFILL, tokens=length, prompt=length, dense_from=length)
    store = KVStore(0, HALVING, timeline, recalls=recalls)
    seen = torch.zeros(rows, length, dtype=torch.bool)
    seen[:, :visual] = True
    _, block = read_prompt(seen, None, 0, per_image=False)
    store.receive(*pair(rows, length))
    store.admit(block, torch.rand(rows, length), [(visual,)] * rows)
    return store


def decode(store: KVStore, tokens: int = 1) -> torch.Tensor:
    """A pass behind the prompt; the keys that attention reads."""
    line = store.timeline
    line.phase, line.start, line.tokens = Phase.APPEND, store.length, tokens
    store.write()
    store.evict_if_full()
    keys, _ = store.append(*pair(len(store.rows), tokens))
    line.phase = Phase.IDLE
    return keys


def test_a_buffer_that_grows_leaves_annealed_entries_behind() -> None:
    store = with_visual(40, 4)
    for _ in range(30):
        decode(store)
    assert store.filled.base >= 40
    assert store.filled.capacity < 40 + 4 + 30


def test_a_pass_that_was_broken_off_leaves_no_room_for_the_next() -> None:
    store = with_visual(4, 4)
    decode(store)
    store.make_room(3)
    assert decode(store).shape[2] == store.visible_tokens


@pytest.mark.parametrize("size_first", [False, True])
def test_kernels_for_several_queries_get_keys_with_the_head_size_last(size_first: bool) -> None:
    store = KVStore(0, WHOLE, Timeline(Phase.PREFILL, tokens=8, prompt=8, dense_from=8))
    _, block = read_prompt(torch.zeros(1, 8, dtype=torch.bool), None, 0, per_image=False)
    store.receive(*pair(1, 8))
    store.admit(block, None, [()], size_first)
    assert (decode(store, 1).stride(-1) != 1) == size_first
    assert decode(store, 2).stride(-1) == 1


def test_starts_are_worked_out_once_in_a_step() -> None:
    store = with_visual(4, 4)
    assert store.row_starts(2) is store.row_starts(2)


def test_compacting_a_store_that_recalls_frees_nothing() -> None:
    freed = []
    for recalls in (False, True):
        store = with_visual(8, 4, recalls=recalls)
        for _ in range(3):
            decode(store)
        store.compact()
        freed.append(store.filled.base)
    assert freed == [HALVING.kept(0, 8) - HALVING.visible(0, 8, 3), 0]


def test_a_new_ranking_moves_nothing_but_what_is_seen_and_visual() -> None:
    store = with_visual(8, 4)
    for _ in range(2):
        decode(store)
    before = store.filled.view(store.filled.keys, 0).clone()
    first, (start,) = store.ranked()
    assert first == start == 4
    scores = torch.tensor([[0.3, 0.1, 0.4, 0.2] + [0.0] * 6])
    store.rerank(scores)
    after = store.filled.view(store.filled.keys, 0)
    order = [0, 1, 2, 3, 5, 7, 4, 6, *range(8, 14)]
    assert torch.equal(after, before[:, :, order])


def test_a_new_ranking_leaves_what_other_rows_still_see_in_its_place() -> None:
    """Rows of other lengths begin elsewhere: columns before a row's start are not its own."""
    one, two = sequence(WHOLE, 6, visual=2), sequence(WHOLE, 6, visual=4)
    store = JoinedStore(0, [one, two], Timeline())
    store.fill([entries(4, visual=2), entries(6, visual=4)])
    before = store.filled.view(store.filled.keys, 0).clone()
    store.rerank(torch.tensor([[0.9, 0.9, 0.2, 0.1, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]]))
    after = store.filled.view(store.filled.keys, 0)
    assert torch.equal(after[0], before[0][:, [0, 1, 3, 2, 4, 5]])
    assert torch.equal(after[1], before[1][:, [3, 2, 1, 0, 4, 5]])


def test_a_floor_of_each_image_is_the_last_to_be_seen() -> None:
    """Of two images the larger one's floor is two tokens, the smaller one's none."""
    anneal = st3.Anneal("linear", tau=10, floor=0.15)
    schedule = Schedule.from_shares([0.5], anneal)
    images = (10, 3)
    visual = torch.tensor([[t for n in images for t in (0, *[1] * n)] + [0]], dtype=torch.bool)
    _, block = read_prompt(visual, None, 0, per_image=True)
    score = torch.rand(visual.shape)
    block, columns = select(block, score, [[schedule.kept(0, n) for n in images]])
    store = KVStore(0, schedule, Timeline(Phase.PREFILL, tokens=16, prompt=16))
    store.receive(*pair(1, columns.shape[1]))
    store.admit(block, score.gather(1, columns), [images])
    places = store.write()
    assert places is not None
    assert [schedule.visible(0, n, 8) for n in images] == [2, 0]
    (start,) = store.row_starts(8)
    assert all(place <= 10 for place in places[0, start : start + 2].tolist())


# Compiled steps, and memory that was made in inference mode ---------------------------------------


def test_compiled_steps_are_given_buffers_of_whole_buckets() -> None:
    store = with_visual(4, 4)
    store.write()
    for _ in range(3):
        store.make_fixed_room(store.first_visible(), 16)
        buffer = store.filled
        assert buffer.capacity % 16 == 0
        assert buffer.capacity - buffer.width >= 8
        assert not buffer.keys[:, :, buffer.width :].any()
        for _ in range(30):  # other passes in between make other buffers
            decode(store, 2)


def test_rows_are_chosen_of_a_prompt_that_waits() -> None:
    store = with_visual(4, 4, rows=2)
    key = store.received.key
    store.select_rows(torch.tensor([1]))
    assert len(store.rows) == store.filled.rows == 1
    assert torch.equal(store.filled.view(store.filled.keys, 4)[0], key[1, :, 4:])


def test_choosing_as_many_rows_keeps_the_memory_where_it_is() -> None:
    store = with_visual(4, 4, rows=2)
    store.write()
    before = store.filled.keys
    place, rows = before.data_ptr(), before.clone()
    store.select_rows(torch.tensor([1, 0]))
    assert store.filled.keys.data_ptr() == place
    width = store.filled.width
    assert torch.equal(store.filled.keys[:, :, :width], rows[[1, 0], :, :width])


@pytest.mark.parametrize("change", ["rows", "fixed"])
def test_what_was_stored_in_inference_mode_can_be_changed_outside(change: str) -> None:
    with torch.inference_mode():
        store = with_visual(4, 4)
        store.write()
        if change == "fixed":
            store.make_fixed_room(0, 16)
    if change == "rows":
        store.select_rows(torch.tensor([0]))
    else:
        store.make_fixed_room(0, 16)
        store.next_column = torch.tensor([store.filled.width])
        store.append_fixed(*pair(1, 1))
    assert not store.filled.keys.is_inference()


# Rows that join -----------------------------------------------------------------------------------


def sequence(schedule: Schedule, prompt: int, visual: int = 0) -> JoinedSequence:
    counts = VisibleCounts(schedule, (visual,) if visual else ())
    return JoinedSequence(counts, prompt, position=(prompt,))


def entries(columns: int, visual: int = 0) -> SequenceEntries:
    positions = torch.arange(columns)[None]
    return SequenceEntries(*pair(1, columns), visual, visual, positions)


def test_nothing_of_a_longer_leaver_is_left_before_a_newcomer() -> None:
    """The mask hides it, but not what is no number: it would still be multiplied by zero."""
    store = JoinedStore(0, [sequence(WHOLE, 5)], Timeline())
    longer = entries(5)
    longer.keys.fill_(float("nan"))
    longer.values.fill_(float("nan"))
    store.fill([longer])
    store.place(0, entries(3))
    for tensor in (store.filled.keys, store.filled.values):
        assert torch.isfinite(tensor[:, :, : store.width]).all()


def test_a_row_is_handed_on_with_what_is_left_of_its_order() -> None:
    one = sequence(HALVING, 7, visual=4)
    store = JoinedStore(0, [one], Timeline())
    store.fill([entries(7, visual=4)])
    for _ in range(2):
        store.timeline.start, store.timeline.tokens = store.length, 1
        store.append(*pair(1, 1))
        one.steps += 1
        store.synchronise()
    handed = store.entries(0)
    assert HALVING.visible(0, 4, 2) == 2
    assert (handed.visual, handed.ordered, handed.columns) == (2, 2, 2 + 3 + 2)


@pytest.mark.parametrize("lengths", [(30, 10), (10, 30), (12, 12)])
def test_each_row_keeps_its_own_window_and_little_more(lengths: tuple[int, int]) -> None:
    window, own = 8, [sequence(WHOLE, length) for length in lengths]
    store = JoinedStore(0, own, Timeline(), window)
    store.fill([entries(length) for length in lengths])
    for _ in range(60):
        store.timeline.start, store.timeline.tokens = store.length, 1
        store.evict_if_full()
        store.append(*pair(2, 1))
        store.note_positions(torch.tensor([[one.length] for one in own]))
        for one in own:
            one.steps += 1
        store.synchronise()
        for row, one in enumerate(own):
            start = store.row_starts(store.step)[row]
            held = set(store.positions(start)[row].tolist())
            assert held >= set(range(one.length - window, one.length))
        store.check_integrity()
    assert store.width <= window + 2 * 16


def test_a_row_that_is_ranked_anew_keeps_all_text() -> None:
    """The new ranking reads attention over all of it."""
    one = sequence(WHOLE, 10)
    one.rerank = 4
    store = JoinedStore(0, [one], Timeline(), window=8)
    store.fill([entries(10)])
    for _ in range(60):
        store.timeline.start, store.timeline.tokens = store.length, 1
        store.evict_if_full()
        store.append(*pair(1, 1))
        store.note_positions(torch.tensor([[one.length]]))
        one.steps += 1
        store.synchronise()
    assert store.positions(0).tolist() == [list(range(70))]


def test_an_untrimmed_row_is_taken_over_with_its_places() -> None:
    taken = plain_entries(*pair(1, 4), length=10, window=5)
    assert taken.positions is not None
    assert taken.positions.tolist() == [[6, 7, 8, 9]]


def test_only_a_prompt_of_one_row_can_join() -> None:
    assert entries_of(with_visual(4, 4)).columns == 8
    with pytest.raises(st3.TrimStateError, match="exactly one row"):
        entries_of(with_visual(4, 4, rows=2))
