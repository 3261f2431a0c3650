"""Watching a model: its output untouched, the measures right, the memory flat."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import st3
from st3.models import families, find_parts
from st3.tools.see import GROUPS, Collector, Watch, analyse
from st3.tools.see.collect import LENGTHS, ByLength
from tests.zoo import FAMILIES, I, T, build

SUPPORTED = {family.model_type for family in families()}
WATCHED = [name for name, f in FAMILIES.items() if (f.model_type or name) in SUPPORTED]


class Notes:
    """Keeps everything it hears."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.heard: list[dict[int, tuple[Tensor, Tensor]]] = [{}]
        self.steps: list[int] = []

    def prompt(self, prompt: Any) -> None:
        self.prompts.append(prompt)

    def layer(self, layer: int, attention: Tensor, columns: Tensor) -> None:
        self.heard[-1][layer] = (attention, columns)

    def done(self, step: int) -> None:
        self.steps.append(step)
        self.heard.append({})


def generate(model: Any, batch: Any, tokens: int) -> Tensor:
    with torch.no_grad():
        out = model.generate(
            **batch, max_new_tokens=tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits, 1)


def one(name: str) -> tuple[Any, Any]:
    family, model = build(name)
    return model, family.inputs(model, [[T(5), I(), T(4)]])


@pytest.mark.parametrize("name", WATCHED)
def test_every_family_is_watched_without_a_change(name: str) -> None:
    model, batch = one(name)
    bare = generate(model, batch, 3)
    notes = Notes()
    with Watch(model, notes):
        watched = generate(model, batch, 3)
    assert torch.equal(watched, bare)
    assert notes.steps == [0, 1, 2]
    layers = len(find_parts(model).layers)
    for heard in notes.heard[:-1]:
        assert sorted(heard) == list(range(layers))
        for attention, columns in heard.values():
            assert attention.shape == columns.shape
            assert float(attention.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(generate(model, batch, 3), bare)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma2"])
def test_attention_is_the_models_own(name: str) -> None:
    """Against output_attentions of the eager kernel, sliding windows included."""
    model, batch = one(name)
    notes = Notes()
    with Watch(model, notes):
        generate(model, batch, 3)
    find_parts(model).text.config._attn_implementation = "eager"
    with torch.no_grad():
        out = model.generate(
            **batch, max_new_tokens=3, do_sample=False, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    width = batch["input_ids"].shape[1]
    for step, (heard, layers) in enumerate(zip(notes.heard, out.attentions, strict=False)):
        for layer, weights in enumerate(layers):
            attention, columns = heard[layer]
            mine = torch.zeros(width + step).index_add_(0, columns, attention)
            full = weights[0, :, -1].mean(0)
            theirs = torch.zeros(width + step)
            theirs[width + step - len(full) :] = full
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_trimmed_model_is_heard_on_what_it_still_sees() -> None:
    model, batch = one("llava")
    policy = st3.ST3(stride=2, anneal=st3.Anneal("linear", tau=6, floor=0))
    with st3.trim(model, policy) as trimmer:
        plain = generate(model, batch, 8)
        notes = Notes()
        with Watch(model, notes) as watch:
            watched = generate(model, batch, 8)
            report = trimmer.report
            visual = notes.prompts[0].visual
            orders = [watch.stored(layer) for layer in range(8)]
        assert torch.equal(watched, plain)
        assert torch.equal(generate(model, batch, 8), plain)
    assert torch.equal(generate(model, batch, 3), generate(model, batch, 3))
    for step, heard in enumerate(notes.heard[:-1]):
        for layer, (_, columns) in heard.items():
            there = columns[torch.isin(columns, visual)]
            order = orders[layer]
            assert order is not None
            assert len(there) == trimmer.schedule.visible(layer, len(visual), step)
            if step == 0:
                kept = visual[report.kept_positions(layer)]
                assert torch.equal(there.sort().values, kept)
            else:  # what is left is the tail of the cache's order
                ranked = order[torch.isin(order, visual)]
                assert torch.equal(there, ranked[len(ranked) - len(there) :])
    assert len(set(notes.heard[7][7][1].tolist()) & set(visual.tolist())) == 0


def test_a_trimmed_model_is_heard_behind_its_windows() -> None:
    """Windows of 16 tokens, a longer prompt, and an answer during which layers are cleared."""
    family, model = build("gemma3")
    batch = family.inputs(model, [[T(21), I(), T(30)]])
    windows = find_parts(model).windows
    notes = Notes()
    with st3.trim(model, "st3", stride=2):
        plain = generate(model, batch, 40)
        with Watch(model, notes):
            assert torch.equal(generate(model, batch, 40), plain)
    width, visual = batch["input_ids"].shape[1], set(notes.prompts[0].visual.tolist())
    for step, heard in enumerate(notes.heard[1:-1], 1):
        end = width + step
        for layer, (attention, columns) in heard.items():
            window, found = windows[layer], columns.tolist()
            assert attention.shape == columns.shape
            assert len(set(found)) == len(found)
            first = 0 if window is None else end - window
            assert set(range(first, end)) - visual <= set(found) <= set(range(end))
            assert float(attention[columns < first].sum()) == 0
            if window is not None:
                assert len(found) <= 16 + window + 20


@pytest.mark.parametrize("trimmed", [False, True])
def test_nothing_is_left_behind(trimmed: bool) -> None:
    model, batch = one("llava_next")

    def state() -> list[Any]:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        attributes = [sorted(m.__dict__) for m in model.modules()]
        return [hooks, attributes, find_parts(model).text.config._attn_implementation]

    before = state()
    with st3.trim(model, "st3" if trimmed else "none"):
        inside = state()
        with Watch(model, Notes()):
            generate(model, batch, 2)
        assert state() == inside
        generate(model, batch, 2)
        with pytest.raises(RuntimeError, match="stop"), Watch(model, Notes()):
            raise RuntimeError("stop")
        assert state() == inside
    assert state() == before


def test_two_rows_two_watchers_and_compiled_runs_are_refused() -> None:
    family, model = build("llava")
    two = family.inputs(model, [[T(3), I(), T(2)]] * 2)
    with pytest.raises(st3.TrimStateError, match="one prompt"), Watch(model, Notes()):
        generate(model, two, 2)
    with (
        pytest.raises(st3.TrimStateError, match="already"),
        Watch(model, Notes()),
        Watch(model, Notes()),
    ):
        pass
    with (
        pytest.raises(st3.TrimStateError, match="rerank_every"),
        st3.trim(model, "st3", rerank_every=2),
        Watch(model, Notes()),
    ):
        pass


# Measures ---------------------------------------------------------------------------------------


def test_measures_of_a_small_example_by_hand() -> None:
    """Two layers, 2 text + 4 visual + 1 text tokens, one decode step."""
    from st3.tools.see.result import finish

    collector = Collector(2, keep=0.25)
    collector.prompt(st3.tools.see.Prompt(7, torch.tensor([2, 3, 4, 5])))
    columns = torch.arange(7)
    collector.layer(0, torch.tensor([0.1, 0.1, 0.4, 0.0, 0.0, 0.0, 0.4]), columns)
    collector.layer(1, torch.tensor([0.1, 0.1, 0.2, 0.2, 0.0, 0.0, 0.4]), columns)
    collector.done(0)
    columns = torch.arange(8)
    collector.layer(0, torch.tensor([0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5]), columns)
    collector.layer(1, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.3, 0.5]), columns)
    collector.done(1)
    got = finish(collector)
    assert GROUPS == ("visual", "system", "question", "generated")
    assert got.prefill.shares[0] == pytest.approx([0.4, 0.2, 0.4, 0.0])
    assert got.decode is not None
    assert got.decode.shares[1] == pytest.approx([0.2, 0.0, 0.3, 0.5])
    assert got.prefill.previous_cosine[1] == pytest.approx(math.sqrt(0.5))
    # p = (1, 0), q = (1/2, 1/2): entropy of (3/4, 1/4) minus 1/2 bit
    wanted = 1 - (0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5)
    assert got.prefill.previous_js[1] == pytest.approx(wanted, abs=1e-6)
    assert got.prefill.high == [1, 2]
    assert got.decode.high == [0, 1]
    assert got.prefill.holding == [1, 2]
    assert got.decode.holding == [4, 1]
    assert got.prefill.overlap == [[1, 1], [1, 1]]
    assert got.same_as_first[0][1] == 0
    assert got.lengths == [1]
    assert got.visual_tokens == 4
    assert not got.placed
    # Order of four tokens in twelfths: layer 0 looks at the first fourth in the prefill and
    # everywhere in the step.
    assert got.rows[0] == pytest.approx([2.5] * 3 + [0.5] * 9, abs=1e-5)


def test_bins_along_the_answer_double_their_width() -> None:
    bins = ByLength((1,), torch.device("cpu"))
    for step in range(1, 301):
        bins.add(step, torch.tensor([float(step)]))
    lengths, means = bins.means()
    assert bins.width == 8
    assert len(lengths) == math.ceil(300 / 8) <= LENGTHS
    assert lengths[0] == 4.5
    assert means[:, 0].tolist()[:-1] == pytest.approx(lengths[:-1])
    assert float(bins.counts.sum()) == 300


def test_nothing_is_computed_in_float64_which_apple_gpus_lack() -> None:
    model, batch = one("llava")
    with NoFloat64():
        analyse(model, [(batch, None)], max_new_tokens=4)


class NoFloat64(TorchDispatchMode):
    """Fails where an operation makes a float64 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else []
        assert not any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in made), func
        return out


def test_position_bias_counts_tokens_by_their_places() -> None:
    from st3.models.places import Place

    collector = Collector(1)
    collector.place([Place(0, (0, 0, 1, 0.5)), Place(0, (0, 0.5, 1, 1)), Place(0, None)])
    collector.prompt(st3.tools.see.Prompt(4, torch.tensor([0, 1, 2])))
    collector.layer(0, torch.tensor([0.6, 0.2, 0.0, 0.2]), torch.arange(4))
    collector.done(0)
    rows = collector.rows[0].tolist()
    assert rows[0] / rows[-1] == pytest.approx(3)
    assert collector.columns[0].std() == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_answer() -> None:
    """Bytes of all tensors that the collector and the watcher hold, early and late in an answer."""
    model, batch = one("llava")
    batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    held: dict[int, int] = {}

    class Counting(Collector):
        def done(self, step: int) -> None:
            super().done(step)
            if step in (40, 240):
                held[step] = sum(_held(self, watch).values())

    collector = Counting(8)
    with Watch(model, collector) as watch, torch.no_grad():
        model.generate(**batch, max_new_tokens=242, do_sample=False)
    # What is left to grow is the positions of a step, which the watcher makes anew in each.
    assert 0 <= held[240] - held[40] <= 8 * 4 * 200
    assert collector.shares_by_length.width == 4


@pytest.mark.slow
def test_the_sums_of_a_large_model_are_small() -> None:
    """32 layers and 2,880 visual tokens: at most 2 MiB, the same at every step."""
    collector, sizes = Collector(32), []
    collector.prompt(st3.tools.see.Prompt(2940, torch.arange(20, 2900)))
    for step in range(24):
        attention = torch.rand(2940 + step).softmax(0)
        columns = torch.arange(2940 + step)
        for layer in range(32):
            collector.layer(layer, attention, columns)
        collector.done(step)
        if step in (2, 23):
            sizes.append(sum(_held(collector).values()))
    assert sizes[1] == sizes[0] < 2 << 20


def _held(*roots: Any) -> dict[int, int]:
    """Bytes of the tensors that objects of st3 hold, by their storage; of the model they hold none
    of their own."""
    found: dict[int, int] = {}
    todo, seen = list(roots), set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, torch.nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple | set):
            todo += thing
        elif type(thing).__module__.startswith(("st3.tools.see", "tests")):
            todo += vars(thing).values()
    return found


def test_lazy_layers_are_like_the_layer_before() -> None:
    from st3.tools.see import lazy_layers

    model, batch = one("llava")
    analysis = analyse(model, [(batch, None)] * 2, max_new_tokens=6)
    assert analysis.prompts == 2
    assert analysis.decode_steps == 10
    assert analysis.num_layers == 8
    lazy = [i for i in range(1, 8) if analysis.typical.previous_cosine[i] >= 0.9]
    assert lazy_layers(analysis) == lazy
    with pytest.raises(ValueError, match="nothing was analysed"):
        analyse(model, [])
