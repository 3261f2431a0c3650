"""What the tests of hybrids share: policies with their counts, batches, and the comparison."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import st3
from st3.hf.call import CACHE, cache_of
from tests.slow_counts import Counts
from tests.slow_hybrids import Row, text_of
from tests.zoo import Family, I, T, V, build

ANNEAL = st3.Anneal(tau=12, floor=0.1)
NONE = st3.Anneal("none")
# Each policy, and its counts by the paper's equations.
POLICIES: dict[str, tuple[st3.Policy | None, Counts]] = {
    "bare": (None, Counts()),
    # At layer 2, which is before the first layer that can rank in most of these decoders.
    "static": (
        st3.ST3(first_layer=2, first_drop=0.4, final_keep=0.1, stride=1, anneal=NONE,
                score="attention"),
        Counts(2, 0.4, 0.1, 1),
    ),
    "anneal": (
        st3.ST3(first_layer=3, first_drop=0.4, final_keep=0.1, stride=2, anneal=ANNEAL,
                score="attention"),
        Counts(3, 0.4, 0.1, 2, tau=12, floor=0.1),
    ),
    "fastv": (st3.FastV(layer=4, drop=0.5), Counts(4, 0.5, 0.5)),
    "anneal_only": (
        st3.ST3(first_drop=0, final_keep=1, anneal=ANNEAL, score="attention"),
        Counts(tau=12, floor=0.1),
    ),
}  # fmt: skip
Rows = list[list[T | I | V]]


@cache
def made(name: str, attention: str | None = None) -> tuple[Family, PreTrainedModel]:
    """A model that no test changes for good."""
    family, model = build(name)
    if attention is not None:
        text_of(model).config._attn_implementation = attention
    return family, model


def rows_for(family: Family) -> Rows:
    """A ragged batch: rows of one, two and no image, that lose different numbers of tokens."""
    if not family.dynamic_size:
        return [[T(5), I(), T(4)], [T(3), I(), T(2), I(), T(6)], [T(20)], [T(2), I(), T(3)]]
    return [
        [T(5), I(3, 4), T(4)],
        [T(3), I(2, 3), T(2), I(3, 4), T(6)],
        [T(20)],
        [T(2), I(4, 4), T(3)],
    ]


# Several chunks of the delta rule (64 tokens each).
LONG: Rows = [
    [T(50), I(7, 10), T(40)],
    [T(30), I(10, 12), T(20), I(6, 9), T(36)],
    [T(80)],
    [T(20), I(9, 9), T(75)],
]


def slow(
    family: Family, model: PreTrainedModel, rows: Rows, i: int, counts: Counts, new: int = 12
) -> Row:
    """Row ``i`` and an answer of ``new`` tokens, by the reference."""
    solo = family.inputs(model, rows, only=i)
    visual = family.visual_mask(model, solo)[0]
    return Row(model, dict(solo), visual, counts).generate(new)


def answer(
    model: PreTrainedModel, batch: dict[str, Any], policy: st3.Policy | None, new: int = 12
) -> tuple[Tensor, Tensor]:
    """Tokens [B, new] and logits [B, new, vocabulary] of generate(), greedy."""

    def run() -> Any:
        return model.generate(
            **batch, max_new_tokens=new, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip

    if policy is None:
        out = run()
    else:
        with st3.trim(model, policy):
            out = run()
    return out.sequences[:, -new:], torch.stack(out.logits, 1)


def compare(
    family: Family, model: PreTrainedModel, rows: Rows, policy: st3.Policy | None, counts: Counts,
    ragged: bool, new: int = 12,
) -> float:  # fmt: skip
    """The largest difference of a logit from the reference's, of all rows, each alone or all in
    one batch. Tokens must be equal."""
    worst = 0.0
    groups = [list(range(len(rows)))] if ragged else [[i] for i in range(len(rows))]
    for group in groups:
        batch = family.inputs(model, rows, only=None if ragged else group[0])
        tokens, logits = answer(model, batch, policy, new)
        for place, i in enumerate(group):
            row = slow(family, model, rows, i, counts, new)
            assert tokens[place].tolist() == row.tokens, f"row {i}"
            worst = max(worst, float((logits[place] - torch.stack(row.logits)).abs().max()))
    return worst


def off_in_a_turn_of_text(name: str) -> float:
    """The largest difference of a logit behind a later turn of text from the reference's."""
    family, model = made(name, "sdpa")
    rows = rows_for(family)
    policy, counts = POLICIES["static"]
    solo = family.inputs(model, rows, only=1)
    more = torch.tensor([[40, 50, 60, 70, 80]])
    with st3.trim(model, policy), torch.no_grad():
        out = model.generate(
            **solo, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([out.sequences[:, -1:], more], 1)
        got = model(input_ids=ids, logits_to_keep=1, **{CACHE: cache_of(out)}).logits[0, -1]
    row = slow(family, model, rows, 1, counts, 6)
    return float((got - row.append(ids)).abs().max())


def off_without_a_cache(name: str) -> float:
    """The largest difference of a logit of forward() without a cache from the reference's."""
    family, model = made(name, "sdpa")
    rows = rows_for(family)
    policy, counts = POLICIES["static"]
    with st3.trim(model, policy), torch.no_grad():
        got = model(**family.inputs(model, rows), use_cache=False).logits[:, -1]
    wanted = [slow(family, model, rows, i, counts, 1).logits[0] for i in range(len(got))]
    return float((got - torch.stack(wanted)).abs().max())


def check_beams_and_sampling(name: str, options: dict[str, Any]) -> None:
    """st3's own cache that drops nothing gives the bare model's tokens; rows of a trimmed batch are
    those of each alone."""
    family, model = made(name, "sdpa")
    rows = rows_for(family)
    given = {"max_new_tokens": 8, "do_sample": False, **options}

    def run(only: int | None = None) -> Any:
        torch.manual_seed(0)
        return model.generate(**family.inputs(model, rows, only=only), **given)[:, -8:]

    bare = run()
    with st3.trim(model, "none", own_cache=True):
        assert torch.equal(run(), bare)
    with st3.trim(model, POLICIES["static"][0]):
        trimmed = run()
        assert not torch.equal(trimmed, bare)
        if "num_beams" in options:
            alone = torch.cat([run(i) for i in range(len(rows))])
            assert torch.equal(trimmed, alone)
