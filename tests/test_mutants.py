"""Ways to break the engine that no other test noticed when they were tried."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from st3.engine.decode import dense_decode
from tests.helpers import Case
from tests.test_cache import Run
from tests.test_turns import words
from tests.zoo import I, T


def test_chosen_rows_forget_where_the_old_rows_began() -> None:
    """The starts of a step are remembered by row; choosing rows after that step changes them."""
    run = Run(Case.of("llava", [[T(5), I(), T(4)], [T(3), I(), T(9)], [T(7)]]))
    run.feed(words(3, 1, 1)["input_ids"])
    before = [layer.row_starts(layer.step) for layer in run.cache.layers]
    assert len(set(before[0])) > 1
    run.cache.batch_select_indices(torch.tensor([2, 0]))
    for layer, starts in zip(run.cache.layers, before, strict=True):
        assert layer.row_starts(layer.step) == (starts[2], starts[0])
        assert layer.live_tokens == 2 * layer.end - starts[2] - starts[0]


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
    output, _ = dense_decode(module, query, key, value, mask if masked else None, scaling)
    torch.testing.assert_close(output, wanted.transpose(1, 2))
