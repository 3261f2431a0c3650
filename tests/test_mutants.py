"""Ways to break the engine that no other test noticed when they were tried."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

import st3
from st3.engine.decode import decode_attention
from st3.engine.kv.visible import FOREVER
from st3.engine.prompt import Block, read_prompt
from st3.engine.select import (
    block_features,
    cache_order,
    gather_tokens,
    rank_visual,
    scatter_columns,
    select,
)
from st3.hf.cache import stores_of
from st3.hf.call import CACHE
from st3.methods.schedule import Curve
from tests.helpers import Case, assert_same
from tests.test_cache import Run
from tests.test_turns import words
from tests.zoo import I, T


def test_chosen_rows_forget_where_the_old_rows_began() -> None:
    """The starts of a step are remembered by row; choosing rows after that step changes them."""
    run = Run(Case.of("llava", [[T(5), I(), T(4)], [T(3), I(), T(9)], [T(7)]]))
    run.feed(words(3, 1, 1)["input_ids"])
    stores = list(stores_of(run.cache).values())
    before = [store.row_starts(store.step) for store in stores]
    assert len(set(before[0])) > 1
    run.cache.batch_select_indices(torch.tensor([2, 0]))
    for store, starts in zip(stores, before, strict=True):
        assert store.row_starts(store.step) == (starts[2], starts[0])
        assert store.visible_tokens == 2 * store.end - starts[2] - starts[0]


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_decoding_is_attention(scaling: float | None, masked: bool) -> None:
    """With grouped queries, a mask, and a scaling of the family's own."""
    torch.manual_seed(0)
    query = torch.randn(2, 6, 1, 8)
    key, value = torch.randn(2, 2, 2, 5, 8).unbind()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    wanted = scaled_dot_product_attention(
        query, key, value, mask if masked else None, scale=scaling, enable_gqa=True
    )
    module = torch.nn.Module()
    output, _ = decode_attention(module, query, key, value, mask if masked else None, scaling)
    torch.testing.assert_close(output, wanted.transpose(1, 2))


@pytest.mark.parametrize("per_image", [False, True])
def test_on_equal_scores_the_earlier_token_stays(per_image: bool) -> None:
    visual = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    _, block = read_prompt(visual, None, 0, per_image)
    score = torch.zeros(1, 9)
    kept = [[2, 1]] if per_image else [[4]]
    _, columns = select(block, score, kept)
    stays = [0, 1, 2, 4, 5, 8] if per_image else [0, 1, 2, 3, 4, 5, 8]
    assert columns.tolist() == [stays]
    rank = rank_visual(block, score)[visual]
    assert rank.tolist() == ([0, 1, 2, 0, 1, 2] if per_image else [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("tail", [0, 2])
def test_a_prompts_last_token_is_never_visual(tail: int) -> None:
    """Its row ranks the others. Behind it may stand the candidates of assisted decoding."""
    visual = torch.tensor([[0, 1, 1, 1] + [0] * tail], dtype=torch.bool)
    rows, block = read_prompt(visual, None, tail, per_image=False)
    assert rows.images == ((2,),)
    assert rows.n_text == (2 + tail,)
    assert block.visual[0].nonzero().flatten().tolist() == [1, 2]
    assert block.last.tolist() == [3]


@torch.no_grad()
def test_candidates_behind_a_prompt_see_what_their_own_steps_would() -> None:
    """Assisted decoding checks them in the prompt's pass: each is annealed by its own step."""
    fast = st3.ST3(first_drop=0.3, stride=2, anneal=st3.Anneal("linear", tau=4, floor=0))
    case = Case.of("llava", [[T(5), I(), T(4)]])
    run = Run(case, fast)
    ids = words(1, 3, 1)["input_ids"]
    steps = torch.stack([run.feed(ids[:, i : i + 1]) for i in range(3)], 1)
    batch = dict(case.batch)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with st3.trim(case.model, fast) as trimmer:
        assert trimmer._attachment is not None
        trimmer._attachment._checks_candidates = True  # as generate()'s candidates have it
        cache = DynamicCache(config=case.model.config)
        checked = case.model(**batch, **{CACHE: cache}, logits_to_keep=4).logits
    assert_same(checked[:, 1:], steps)
    # All but the first are refused: what follows is as many steps behind the prompt as ever.
    cache.crop(-2)
    run.cache, run.mask = cache, batch["attention_mask"][:, :-2]
    for i in (1, 2):
        assert_same(run.feed(ids[:, i : i + 1]), steps[:, i])


def test_images_that_touch_are_cut_in_their_order() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    rows, block = read_prompt(visual, None, 0, per_image=True, sizes=[2, 3])
    assert rows.images == ((2, 3),)
    assert block.group is not None
    assert block.group[visual].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("sizes", [[2, 2], [2, 3, 1], [6]])
def test_sizes_that_do_not_fit_the_runs_cut_nothing(sizes: list[int]) -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    rows, _ = read_prompt(visual, None, 0, per_image=True, sizes=sizes)
    assert rows.images == ((5,),)


def test_padding_is_never_visual() -> None:
    """A visual_mask of the caller's may say so."""
    visual = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    rows, block = read_prompt(visual, mask, 0, per_image=False)
    assert rows.images == ((2,), (2,))
    assert rows.n_text == (1, 2)
    assert not block.visual[0, 0]


def test_a_mask_that_hides_nothing_is_none() -> None:
    """Kernels are faster without; and no padding means that a turn can be continued."""
    visual = torch.tensor([[0, 1, 1, 0]], dtype=torch.bool)
    _, block = read_prompt(visual, torch.ones(1, 4), 0, per_image=False)
    assert block.valid is None


def test_a_score_that_is_not_a_number_drops_no_text() -> None:
    """Half precision may give one."""
    visual = torch.tensor([[0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    _, block = read_prompt(visual, None, 0, per_image=False)
    score = torch.tensor([[0.0, float("nan"), 2.0, 1.0, 0.0, 0.0]])
    new, columns = select(block, score, [[1]])
    assert columns.tolist() == [[0, 2, 4, 5]]
    assert new.visual.tolist() == [[False, True, False, False]]


def test_of_equal_scores_the_later_token_is_annealed_first() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 0]], dtype=torch.bool)
    _, block = read_prompt(visual, None, 0, per_image=False)
    order = cache_order(block, torch.tensor([[0.0, 0.5, 0.5, 0.2, 0.0]]), [[0]])
    assert order is not None
    assert order.tolist() == [[3, 2, 1, 0, 4]]


@pytest.mark.parametrize("images", [[9, 1, 12, 4], [10, 3]])
@pytest.mark.parametrize("curve", ["cosine", "half_cosine", "linear", "exponential"])
def test_each_image_is_annealed_by_its_own_curve(curve: Curve, images: list[int]) -> None:
    """One start pointer for a row shows of each image as many tokens as the image's own budget
    says, the best of it; a floor may be none of a small image."""
    torch.manual_seed(0)
    visual = torch.tensor([[t for n in images for t in (0, *[1] * n)] + [0]], dtype=torch.bool)
    anneal = st3.Anneal(curve, tau=6, floor=0.15)
    schedule = st3.ST3(first_layer=1, first_drop=0.5, stride=2, anneal=anneal).schedule(8)
    for layer in range(8):
        _, block = read_prompt(visual, None, 0, per_image=True)
        score = torch.rand(visual.shape)
        kept = [[schedule.kept(layer, n) for n in images]]
        block, columns = select(block, score, kept)
        stays = [[schedule.visible(layer, n, FOREVER) for n in images]]
        order = cache_order(block, score.gather(1, columns), stays)
        assert order is not None
        assert block.group is not None
        rank = rank_visual(block, score.gather(1, columns))[0]
        for step in range(9):
            shown = [schedule.visible(layer, n, step) for n in images]
            live = order[0, sum(kept[0]) - sum(shown) : sum(kept[0])]
            seen = sorted(zip(block.group[0, live].tolist(), rank[live].tolist(), strict=True))
            assert seen == [(i, place) for i, n in enumerate(shown) for place in range(n)]


def ragged() -> tuple[torch.Tensor, Block]:
    """Two rows of which one keeps a token less: a column of its block is garbage."""
    visual = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    _, block = read_prompt(visual, None, 0, per_image=False)
    score = torch.tensor([[0.0, 2.0, 1.0, 0.0, 0.0]] * 2)
    return visual, select(block, score, [[2], [1]])[0]


def test_nothing_stands_where_a_ragged_row_lost_a_token() -> None:
    _, block = ragged()
    assert block.valid is not None
    full = scatter_columns(torch.ones(2, 5, 3), block, 5)
    assert full[..., 0].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]


def test_a_ragged_row_is_given_the_features_of_what_it_kept() -> None:
    visual, block = ragged()
    here, features = block_features(block, visual, torch.arange(4.0)[:, None])
    assert features.flatten().tolist() == [0, 1, 2]
    assert here.sum(1).tolist() == [2, 1]


def test_inputs_that_are_not_of_the_prompts_tokens_stay_whole() -> None:
    index = torch.tensor([[0, 2]])
    assert gather_tokens(torch.arange(3)[None], index, 3).tolist() == [[0, 2]]
    for other in (torch.arange(4)[None], torch.arange(3), torch.zeros(2, 3)):
        assert gather_tokens(other, index, 3) is other
