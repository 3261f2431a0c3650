"""What is put on a model, who may use it meanwhile, and what is left behind: nothing."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.cache_utils import CacheLayerMixin

import st3
from st3.engine.events import Observer, PassEvent, PromptEvent, StepEvent
from st3.hf import check as checks
from st3.hf.cache import TrimmedLayer, stores_of
from st3.hf.call import CACHE_NAMES, cache_of
from st3.hf.hooks import Hooks
from st3.models import find_parts
from tests.helpers import METHODS, POLICIES, ST3, Case, answer
from tests.zoo import I, T

SOLO: list[list[Any]] = [[T(5), I(), T(9)]]
ON_EACH = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])


# -- what a user had set before --------------------------------------------------------------------


@pytest.mark.parametrize(
    "attribute", ["get_image_features", "get_placeholder_mask", "pack_image_features"]
)
def test_a_users_own_wrapper_is_there_again_after_exit(attribute: str) -> None:
    case = Case.of("llava_next", SOLO)
    inner: Any = case.model.model
    called: list[str] = []
    original = getattr(inner, attribute)

    @functools.wraps(original)
    def mine(*args: Any, **kwargs: Any) -> Any:
        called.append(attribute)
        return original(*args, **kwargs)

    setattr(inner, attribute, mine)
    with st3.trim(case.model, st3.VisionZip(keep=0.5)), torch.no_grad():
        case.model(**case.batch)
    assert called
    assert inner.__dict__[attribute] is mine


def test_hooks_come_off_in_the_reverse_order() -> None:
    module = nn.Linear(2, 2)
    module.mark = "before"  # type: ignore[assignment]
    hooks = Hooks()
    hooks.replace(module, "mark", "first")
    hooks.replace(module, "mark", "second")
    hooks.replace(module, "fresh", 1)
    with hooks.suspended():
        assert module.mark == "before"
        assert "fresh" not in vars(module)
    assert module.mark == "second"
    hooks.restore()
    hooks.restore()
    assert module.mark == "before"
    assert "fresh" not in vars(module)
    assert not hooks


# -- copies of a trimmed model ---------------------------------------------------------------------


@ON_EACH
@pytest.mark.parametrize("part", ["model", "inner", "text"])
def test_a_copy_of_a_trimmed_model_is_the_bare_model(name: str, part: str) -> None:
    case = Case.of(name, SOLO)
    bare = case.generate(None, 4)
    with st3.trim(case.model, ST3):
        trimmed = case.generate(None, 4)
        parts = find_parts(case.model)
        whole = {"model": case.model, "inner": parts.inner, "text": parts.text}[part]
        twin = copy.deepcopy(whole)
        assert torch.equal(torch.stack(case.generate(None, 4).logits), torch.stack(trimmed.logits))
    for module in twin.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not [hook for hook in hooks if hook.__module__.startswith("st3")]
        assert not [key for key in vars(module) if "st3" in key or key == "__deepcopy__"]
    if part == "model":
        other = Case(case.family, twin, case.batch, case.visual)
        for _ in range(2):
            assert torch.equal(
                torch.stack(other.generate(None, 4).logits), torch.stack(bare.logits)
            )
            with st3.trim(twin, "none"):
                pass


def test_a_model_of_a_config_copied_while_trimmed_can_be_trimmed() -> None:
    case = Case.of("llava", SOLO)
    plain = case.generate(ST3, 3)
    with st3.trim(case.model, ST3):
        config = copy.deepcopy(case.model.config)
    twin = type(case.model)(config).eval()
    twin.load_state_dict(case.model.state_dict())
    other = Case(case.family, twin, case.batch, case.visual)
    assert torch.equal(other.generate(ST3, 3).sequences, plain.sequences)


# -- several threads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llava", "st3"),
        ("qwen2_5_vl", "st3"),
        ("smolvlm", "default"),  # asks what the encoder was given
        ("qwen2_5_vl", "default"),
        ("llava", "visionzip"),  # listens to the tower
    ],
)
def test_two_threads_get_the_answers_that_each_gets_alone(name: str, policy: str) -> None:
    first, second = Case.of(name, SOLO), Case.of(name, [[T(12), I(), T(4), I(), T(2)]])
    second.model, chosen = first.model, {**POLICIES, **METHODS}[policy]
    alone = [case.generate(chosen, 12).sequences for case in (first, second)]
    found: dict[int, list[Any]] = {0: [], 1: []}

    def work(index: int, case: Case) -> None:
        for _ in range(4):
            try:
                with torch.no_grad():
                    found[index].append(
                        case.model.generate(**case.batch, max_new_tokens=12, do_sample=False)
                    )
            except Exception as error:
                found[index].append(error)

    with st3.trim(first.model, chosen):
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, expected in enumerate(alone):
        assert len(found[index]) == 4
        for got in found[index]:
            assert torch.equal(got, expected), got


def test_a_pass_that_fails_does_not_lock_out_the_next_thread() -> None:
    case = Case.of("llava", SOLO)
    expected = case.generate(ST3, 3).sequences
    layer = case.model.model.language_model.layers[2]
    with st3.trim(case.model, ST3):
        hook = layer.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(OSError("broken")))
        with pytest.raises(OSError, match="broken"):
            case.generate(None, 3)
        hook.remove()
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(case.generate(None, 3).sequences))
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert torch.equal(found[0], expected)


def test_a_policy_cannot_be_exchanged_silently() -> None:
    trimmer = st3.trim(Case.of("llava").model, ST3)
    with pytest.raises(AttributeError, match=r"make another with st3\.trim"):
        trimmer.policy = st3.FastV()
    assert trimmer.policy is ST3


# -- a KV cache is an ordinary object --------------------------------------------------------------


def _continue(case: Case, cache: Any, steps: int = 3) -> torch.Tensor:
    """Greedy tokens behind a prefilled cache."""
    from st3.hf.call import CACHE

    mask, found = case.batch["attention_mask"], []
    token = torch.full((len(mask), 1), 7)
    for _ in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = case.model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
        token = logits[:, -1:].argmax(-1)
        found.append(logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_cache_can_be_copied_and_pickled(name: str, steps: int) -> None:
    """Right behind a prefill and later; the copy holds no model and no pass."""
    case = Case.of(name)
    with st3.trim(case.model, POLICIES["default"]), torch.no_grad():
        cache = cache_of(case.model(**case.batch))
        if steps:
            copy.deepcopy(case)  # what a user might do meanwhile
        twin = copy.deepcopy(cache)
        data = pickle.dumps(cache)
        assert len(data) < 4 * sum(t.numel() * 4 for t in (cache.layers[0].keys,)) * case.layers
        expected = _continue(case, cache)
        assert torch.equal(_continue(case, twin), expected)
        assert torch.equal(_continue(case, pickle.loads(data)), expected)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_cache_begun_in_inference_mode_goes_on_outside(name: str) -> None:
    case = Case.of(name)
    with st3.trim(case.model, ST3):
        with torch.no_grad():
            plain = cache_of(case.model(**case.batch))
            expected = _continue(case, plain, 5)
        with torch.inference_mode():
            begun = cache_of(case.model(**case.batch))
            first = _continue(case, begun, 2)
        assert torch.equal(first, expected[:2])
        begun.crop(-2)
        with torch.no_grad():
            assert torch.equal(_continue(case, begun, 5), expected)


def test_looking_at_a_cache_changes_nothing() -> None:
    """Nothing allocates, sorts or scores in a property."""
    case = Case.of("llava")
    with st3.trim(case.model, ST3), torch.no_grad():
        cache = cache_of(case.model(**case.batch))
        states = [pickle.dumps(store) for store in stores_of(cache).values()]
        for layer in cache.layers:
            assert layer.keys is not None
            assert layer.values is not None
            assert (layer.is_initialized, layer.get_seq_length()) == (True, case.width)
            for store in (layer.store,):
                assert store.visible_tokens <= store.allocated_tokens
                store.footprint()
                store.check_integrity()
        assert [pickle.dumps(store) for store in stores_of(cache).values()] == states


def test_damage_is_found() -> None:
    case = Case.of("llava")
    with st3.trim(case.model, ST3), torch.no_grad():
        cache = cache_of(case.model(**case.batch))
        _continue(case, cache, 1)
        store = stores_of(cache)[2]
        store.check_integrity()
        store.filled.end += 1000
        with pytest.raises(st3.TrimStateError, match="layer 2 of the cache is damaged"):
            store.check_integrity()


# -- observers -------------------------------------------------------------------------------------


class Notes(Observer):
    attends = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def prompt(self, event: PromptEvent) -> None:
        self.seen.append(("prompt", event.rows.n_visual))

    def step(self, event: StepEvent) -> None:
        self.seen.append(("step", event.past))

    def attention(self, layer: int, call: Any, block: Any) -> None:
        self.seen.append(("attention", layer))

    def scored(self, layer: int, score: Any) -> None:
        self.seen.append(("scored", layer))

    def kept(self, layer: int, block: Any) -> None:
        self.seen.append(("kept", layer))

    def written(self, layer: int, columns: Any) -> None:
        self.seen.append(("written", layer))

    def passed(self, event: PassEvent) -> None:
        self.seen.append(("passed", event.length))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.seen if name == kind]


@pytest.mark.parametrize("policy", ["st3", "none"])
def test_observers_hear_of_a_run_and_change_nothing(policy: str) -> None:
    case = Case.of("llava", SOLO)
    plain, notes = case.generate(POLICIES[policy], 3), Notes()
    with st3.trim(case.model, POLICIES[policy]) as trimmer:
        with trimmer.observe(notes):
            out = case.generate(None, 3)
        heard = len(notes.seen)
        case.generate(None, 3)
        assert len(notes.seen) == heard
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    assert notes.of("prompt") == [(int(case.visual.sum()),)]
    assert notes.of("step") == [case.width, case.width + 1]
    assert notes.of("passed") == [case.width, case.width + 1, case.width + 2]
    assert notes.of("attention") == [*range(case.layers)] * 3
    drops = [3, 5, 7] if policy == "st3" else []
    assert notes.of("kept") == drops
    assert notes.of("scored") == [layer - 1 for layer in drops]
    assert notes.of("written") == ([*range(case.layers)] if drops else [])


def test_only_an_attached_trimmer_is_observed() -> None:
    with (
        pytest.raises(st3.TrimStateError, match=r"attach\(\) it first"),
        st3.trim(Case.of("llava").model).observe(Notes()),
    ):
        pass


# -- does transformers fit? ------------------------------------------------------------------------


def test_the_installed_cache_protocol_is_answered_in_full() -> None:
    assert CacheLayerMixin.__abstractmethods__
    assert not TrimmedLayer.__abstractmethods__


@pytest.mark.parametrize("broken", ["cache name", "layer", "protocol", "layer type"])
def test_what_does_not_fit_is_refused_with_both_versions(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case.of("qwen2_5_vl", SOLO)
    text: Any = find_parts(case.model).text
    if broken == "cache name":

        def forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None) -> None: ...

        monkeypatch.setattr(type(text), "forward", forward)
        assert not set(CACHE_NAMES) & {"input_ids", "inputs_embeds"}
    elif broken == "layer":
        monkeypatch.setattr(type(text.layers[0]), "forward", lambda self, states, **kwargs: None)
    elif broken == "protocol":
        monkeypatch.setattr(TrimmedLayer, "__abstractmethods__", frozenset({"frobnicate"}))
    else:
        monkeypatch.setattr(checks, "LAYER_TYPES", frozenset({"sliding_attention"}))
    with pytest.raises(st3.UnsupportedModelError) as caught:
        st3.trim(case.model, ST3).attach()
    assert f"transformers {checks.OLDEST} to {checks.NEWEST}" in str(caught.value)
    assert transformers.__version__ in str(caught.value)
    assert not case.model._forward_pre_hooks


@pytest.mark.parametrize(("version", "warned"), [("5.24.9", False), ("5.25.0.dev0", True)])
def test_a_newer_transformers_gives_one_warning(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.transformers, "__version__", version)
    parts = find_parts(Case.of("llava", SOLO).model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks._warn_if_newer.cache_clear()
        for _ in range(2):
            checks.check(parts)
    checks._warn_if_newer.cache_clear()
    said = [str(w.message) for w in caught if "st3 is tested with" in str(w.message)]
    assert len(said) == warned
    assert all(version in text for text in said)


# -- compiled decoding lets go of caches -----------------------------------------------------------


def test_a_compiled_trimmer_keeps_no_cache_alive() -> None:
    import gc
    import weakref

    case = Case.of("llava", SOLO)
    with st3.trim(case.model, ST3, compile_decode={"backend": "eager"}):
        out = case.generate(None, 4)
        store = weakref.ref(stores_of(cache_of(out))[0])
        tokens = answer(out, case.width).clone()
        del out
        gc.collect()
        assert store() is None
    assert torch.equal(answer(case.generate(ST3, 4), case.width), tokens)
