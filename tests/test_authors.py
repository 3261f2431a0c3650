"""The authors' own rules, stated without st3: what they keep, st3 keeps, at the same count.

Here are the rules that can be told from what a score is shown. Those of FastV, ST3, SparseVLM and
V2Drop are the formulas of tests/reference_scores.py, which the engine meets in a whole model; where
st3 leaves its sources docs/policies.md says so.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import st3
from st3.methods.schedule import exact, round_share
from st3.methods.scores import LayerView, TokenView, score_named
from tests.reference_picks import principal_choice
from tests.test_cover import image_of

SEEDS = [0, 1, 2]
N = 144


def shown(seed: int, visual: int = N, **more: Any) -> TokenView:
    """A prompt of an image between 3 and 9 text tokens, random."""
    generator = torch.Generator().manual_seed(seed)
    count = 3 + visual + 9
    mask = torch.zeros(1, count, dtype=torch.bool)
    mask[:, 3 : 3 + visual] = True
    return TokenView(
        layer=more.pop("layer", 0),
        hidden=torch.randn(1, count, 32, generator=generator),
        visual=mask,
        ordinal=mask.long().cumsum(1) - 1,
        last=torch.tensor([count - 1]),
        images=((visual,),),
        keys=torch.randn(1, 4, count, 8, generator=generator),
        towers=torch.rand(2, 1, count, generator=generator),
        **more,
    )


def kept(score: Tensor, view: TokenView, count: int) -> set[int]:
    """The ordinals of the ``count`` best visual tokens."""
    own = score[0][view.visual[0]]
    return set(own.argsort(descending=True, stable=True)[:count].tolist())


def of(view: TokenView) -> Tensor:
    """The visual tokens' hidden states, [N, 32]."""
    assert view.hidden is not None
    return view.hidden[0][view.visual[0]]


def cosines(vectors: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return unit @ unit.T


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("part", [1, 4, 8])
def test_dart(seed: int, part: int) -> None:
    """Each of 4 + 4 pivots takes ``part`` of the tokens left, the least like it: 4 + 8 part."""
    view = shown(seed, layer=2)
    assert view.keys is not None
    size = view.keys[0].abs().sum((0, 2))
    image = (size[3 : 3 + N].argsort(descending=True)[:4] + 3).tolist()
    text = (size[3 + N :].argsort(descending=True)[:4] + 3 + N).tolist()
    left = set(range(3, 3 + N)) - set(image)
    cosine = cosines(view.hidden[0])  # type: ignore[index]
    for pivot in image + text:
        own = sorted(left, key=lambda i: float(cosine[pivot, i]))[:part]
        left -= set(own)
    wanted = {i - 3 for i in set(range(3, 3 + N)) - left}
    count = 4 + 8 * part
    assert len(wanted) == count
    policy = st3.DART(keep=(count / N,))
    assert policy.schedule(32).kept(2, N) == count
    assert kept(policy.scorer()(view), view, count) == wanted


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("dominant", "contextual"), [(41, 7), (27, 5), (14, 2), (54, 10)])
def test_visionzip(seed: int, dominant: int, contextual: int) -> None:
    """The patches that the class token looks at most; of the rest every n-th."""
    view = shown(seed)
    count = dominant + contextual
    attention = view.tower[0][view.visual[0]]  # type: ignore[index]
    first = attention.topk(dominant).indices
    rest = [i for i in range(N) if i not in set(first.tolist())]
    step = max(1, len(rest) // contextual)
    wanted = {*first.tolist(), *rest[::step][:contextual]}
    policy = st3.VisionZip(keep=count / N, dominant=dominant / count)
    assert kept(policy.scorer()(view), view, count) == wanted


@pytest.mark.parametrize("seed", SEEDS)
def test_key_norm(seed: int) -> None:
    """ViTCoP: the norm of the key averaged over the heads, the small ones stay."""
    key = torch.randn(2, 8, 20, 16, generator=torch.Generator().manual_seed(seed))
    view = layer_view(key)
    wanted = -key.mean(dim=1).norm(p=2, dim=-1)
    torch.testing.assert_close(score_named("key_norm")(view), wanted)
    rotated = key * 1.0  # RoPE turns all heads of a token alike
    angle = torch.arange(20.0)[:, None]
    rotated[..., :8] = key[..., :8] * angle.cos() - key[..., 8:] * angle.sin()
    rotated[..., 8:] = key[..., 8:] * angle.cos() + key[..., :8] * angle.sin()
    torch.testing.assert_close(score_named("key_norm")(layer_view(rotated)), wanted)


def test_key_norm_of_heads_that_processes_share() -> None:
    """What each process averages is averaged before the norm is taken."""
    halves = torch.randn(2, 1, 4, 20, 16).unbind()
    wanted = score_named("key_norm")(layer_view(torch.cat(halves, dim=1)))
    mean = torch.stack([half.mean(1) for half in halves]).mean(0)
    view = layer_view(halves[0])
    view.over_ranks = lambda own: mean
    torch.testing.assert_close(score_named("key_norm")(view), wanted)


def layer_view(key: Tensor) -> LayerView:
    batch, _, count, _ = key.shape
    return LayerView(
        layer=1,
        hidden=None,
        visual=torch.ones(batch, count, dtype=torch.bool),
        ordinal=torch.arange(count).expand(batch, count),
        last=torch.full((batch,), count - 1),
        query=key,
        key=key,
        scaling=1.0,
        softcap=None,
        key_valid=None,
    )


@pytest.mark.parametrize(("tokens", "counts"), [(576, (217, 19)), (144, (54, 5))])
def test_feather(tokens: int, counts: tuple[int, int]) -> None:
    """The default's counts are those of the code's script, ratio 0.7 and stride 3: 30 % by
    attention and the grid, as far as chance puts it elsewhere; then 9 % of them."""
    side = math.isqrt(tokens)
    on_grid = len(range(0, side, 3)) ** 2
    first = int(tokens * 0.3) + round(0.7 * on_grid)
    assert abs(first - counts[0]) <= 1
    assert abs(int(first * 0.3**2) - counts[1]) <= 1
    schedule = st3.FEATHER().schedule(32)
    assert (schedule.kept(8, tokens), schedule.kept(16, tokens)) == counts


@pytest.mark.parametrize("seed", SEEDS)
def test_divprune(seed: int) -> None:
    """Algorithm 1: first the token whose nearest neighbour is farthest, then always the one whose
    smallest distance to the chosen is largest."""
    view = shown(seed)
    distance = 1 - cosines(of(view))
    apart = distance.masked_fill(torch.eye(N, dtype=torch.bool), math.inf)
    chosen = [int(apart.min(1).values.argmax())]
    while len(chosen) < 48:
        smallest = distance[:, chosen].min(1).values
        smallest[chosen] = -math.inf
        chosen.append(int(smallest.argmax()))
    assert kept(score_named("divprune")(view), view, 48) == set(chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_cdpruner(seed: int) -> None:
    """The fast greedy search for the largest determinant, with its conditional kernel."""
    view = shown(seed, visual=64)
    unit = torch.nn.functional.normalize(view.hidden[0].double(), dim=-1)  # type: ignore[index]
    relevance = (unit[3:67] @ unit[67:].mean(0)).float()
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * cosines(of(view)) * relevance
    gain = kernel.diagonal().clone()
    rows: list[Tensor] = []
    chosen = []
    for _ in range(16):
        best = int(gain.argmax())
        chosen.append(best)
        row = kernel[best].clone()
        for earlier in rows:
            row -= earlier[best] * earlier
        row /= gain[best].sqrt()
        rows.append(row)
        gain = gain - row**2
        gain[chosen] = -math.inf
    assert kept(score_named("cdpruner")(view), view, 16) == set(chosen)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("score", ["relevance", "key_norm"])
def test_maximal_marginal_relevance(seed: int, score: str) -> None:
    """Algorithm 1 of IDPruner: half importance, half unlikeness to what is chosen."""
    view = shown(seed, visual=64)
    if score == "key_norm":
        assert view.keys is not None
        other = layer_view(view.keys)
        other.visual, other.hidden, other.images = view.visual, view.hidden, view.images
        view = other
    weight = score_named(score)(view)[0][view.visual[0]].double()
    weight = (weight - weight.min()) / (weight.max() - weight.min())
    alike = cosines(of(view))
    chosen = [int(weight.argmax())]
    while len(chosen) < 20:
        value = 0.5 * weight - 0.5 * alike[:, chosen].max(1).values
        value[chosen] = -math.inf
        chosen.append(int(value.argmax()))
    assert kept(score_named(f"mmr-{score}")(view), view, 20) == set(chosen)


def test_marginal_relevance_is_importance_or_diversity_alone_at_the_ends() -> None:
    view = shown(0)
    alone = st3.MMR(balance=1.0).scorer()(view)
    assert kept(alone, view, 30) == kept(score_named("relevance")(view), view, 30)
    spread = st3.MMR(balance=0.0).scorer()(view)
    alike = cosines(of(view))
    chosen = sorted(kept(spread, view, 12))
    nearest = alike[chosen][:, chosen].fill_diagonal_(-1).max()
    assert nearest < alike[:12, :12].fill_diagonal_(-1).max()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scope(seed: int, alpha: float) -> None:
    """The attention of each token times what it adds to the best cosine of every token."""
    view = shown(seed, visual=64)
    cosine = cosines(of(view))
    saliency = view.tower[0][view.visual[0]].double() ** alpha  # type: ignore[index]
    best = torch.zeros(64, dtype=torch.double)
    chosen: list[int] = []
    for _ in range(20):
        gain = torch.stack([(cosine[i] - best).relu().sum() for i in range(64)]) * saliency
        gain[chosen] = -math.inf
        chosen.append(int(gain.argmax()))
        best = best.maximum(cosine[chosen[-1]])
    assert kept(st3.SCOPE(alpha=alpha).scorer()(view), view, 20) == set(chosen)


def video(seed: int, frames: int, rows: int, columns: int) -> TokenView:
    """A video whose frames differ ever less from the first one."""
    view = shown(seed, visual=frames * rows * columns)
    view.grids = (((frames, rows, columns),),)
    assert view.hidden is not None
    tokens = view.hidden[0, 3:-9].unflatten(0, (frames, -1))
    tokens[1:] = tokens[:1] + tokens[1:] / torch.arange(1.0, frames)[:, None, None]
    return view


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_evs(seed: int, keep: float) -> None:
    """The whole first frame, then what differs most from the frame before."""
    view = video(seed, 5, 4, 6)
    frames = of(view).double().unflatten(0, (5, 24))
    change = 1 - torch.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    score = torch.cat([torch.full((1, 24), 255.0), change]).flatten()
    count = max(24, round_share(exact(keep), 120))
    wanted = score.argsort(descending=True, stable=True)[:count]
    assert kept(st3.EVS(keep=keep).scorer()(view), view, count) == set(wanted.tolist())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 3, 16, 48, 72, 96, 143, 144])
@pytest.mark.parametrize("alike", [0.0, 2.0])
def test_prunesid(seed: int, count: int, alike: float) -> None:
    """Groups, the tokens in them that are unlike, and parts, by the steps of its code."""
    view = shown(seed)
    assert view.hidden is not None
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(5, 32, generator=generator)  # tokens of few kinds, as images have them
    kinds = torch.randint(0, 5, (view.hidden.shape[1],), generator=generator)
    view.hidden = view.hidden + alike * common[kinds]
    wanted = set(principal_choice(of(view).double(), count))
    assert len(wanted) == count
    assert kept(st3.PruneSID(keep=count / N).scorer()(view), view, count) == wanted


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.7])
def test_vidcom2(seed: int, keep: float) -> None:
    """Quotas by how unlike the video a frame is, filled with the least redundant tokens, then
    brought to the wanted number by redundancy."""
    frames, places = 5, 24
    view = video(seed, frames, 4, 6)
    tokens = of(view)
    steady = tokens.var(0, unbiased=False).argsort()[:16]
    unit = torch.nn.functional.normalize(tokens[:, steady].double(), dim=-1)
    unit = unit.view(frames, places, 16)

    def near(centre: Tensor) -> Tensor:
        squared = ((unit - centre) ** 2).sum(-1)
        return sum((-squared / (2 * a)).exp() for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))  # type: ignore[return-value]

    to_video = near(unit.mean((0, 1)))
    redundant = to_video + near(unit.mean(1, keepdim=True))
    unusual = (-to_video.mean(1) / 0.01).softmax(0)
    mine: set[int] = set()
    for frame in range(frames):
        part = min(1.0, float(keep * (1 + unusual[frame] - unusual.mean())))
        least = redundant[frame].argsort()[: max(1, round(part * places))]
        mine |= {frame * places + int(i) for i in least}
    flat = redundant.flatten().tolist()
    count = round_share(exact(keep), frames * places)
    while len(mine) > count:
        mine.remove(max(mine, key=lambda i: flat[i]))
    while len(mine) < count:
        mine.add(min(set(range(len(flat))) - mine, key=lambda i: flat[i]))
    assert kept(st3.VidCom2(keep=keep).scorer()(view), view, count) == mine


def test_a_video_in_a_ragged_batch_is_ordered_as_alone() -> None:
    """Beside an image of another row, and behind one in its own."""
    clip, image = video(0, 3, 2, 4), shown(1, visual=12)
    together = TokenView(
        layer=0,
        hidden=torch.cat([torch.zeros(2, 12, 32), torch.randn(2, 36, 32)], 1),
        visual=torch.zeros(2, 48, dtype=torch.bool),
        ordinal=torch.zeros(2, 48, dtype=torch.long),
        last=torch.tensor([47, 47]),
        images=((12, 24), (12,)),
        grids=(((3, 4), (3, 2, 4)), (None,)),
    )
    assert together.hidden is not None
    together.visual[0, 2:38] = True
    together.visual[1, 30:42] = True
    together.ordinal = together.visual.long().cumsum(1) - 1
    together.hidden[0, 14:38], together.hidden[1, 30:42] = of(clip), of(image)
    for method in (st3.EVS(), st3.VidCom2()):
        score = method.scorer()(together)
        alone = method.scorer()(clip)[0][clip.visual[0]]
        torch.testing.assert_close(score[0, 14:38], alone)
        image.grids = ((None,),)
        alone = method.scorer()(image)[0][image.visual[0]]
        torch.testing.assert_close(score[1, 30:42], alone)


def test_frames_that_are_images_of_their_own_are_a_video() -> None:
    """Where a model writes the time between frames."""
    whole, parts = video(0, 4, 2, 3), video(0, 4, 2, 3)
    parts.images, parts.grids = ((6,) * 4,), (((1, 2, 3),) * 4,)
    for method in (st3.EVS(), st3.VidCom2()):
        one, other = (method.scorer()(view)[0][view.visual[0]] for view in (whole, parts))
        assert torch.equal(one.argsort(stable=True), other.argsort(stable=True))
    parts.grids = (((2, 3),) * 4,)  # pictures of one size
    score = st3.EVS().scorer()(parts)[0][parts.visual[0]]
    assert torch.equal(score, 4 + score_named("grid")(parts)[0][parts.visual[0]])


def test_an_image_is_the_first_frame_of_a_video() -> None:
    view = image_of(8, 8)
    view.hidden = torch.randn(1, 64, 16)
    order = score_named("evs")(view)[0].argsort(descending=True)
    assert torch.equal(order, score_named("grid")(view)[0].argsort(descending=True))


def test_pyramiddrop_in_its_own_layer_is_not_there_yet() -> None:
    from tests.helpers import Case

    policy = st3.parse("pyramiddrop:own_layer=true")
    assert policy == st3.PyramidDrop(own_layer=True)
    assert st3.parse(str(policy)) == policy
    with pytest.raises(ValueError, match="ranks in the layer that drops"):
        st3.trim(Case.of("llava").model, policy)
