"""What a user may ask for, and what is refused with the remedy; runs in every environment."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from st3.methods.policies import available, parse, presets
from st3.tools.cli._common import CliError
from st3.tools.cli.vllm import app
from st3.vllm import attention, layers, settings

ARCHITECTURE = "LlavaForConditionalGeneration"


def config(policy: str = "st3", layers: int = 24, **changes: Any) -> Any:
    """What is read of vLLM's ``VllmConfig``, with changes: ``parallel__data_parallel_size=2`` of a
    part, ``speculative=...`` of the whole."""
    text = SimpleNamespace(num_hidden_layers=layers)
    parts: dict[str, dict[str, Any]] = {
        "model": {
            "hf_config": SimpleNamespace(model_type="llava", get_text_config=lambda decoder: text),
            "architectures": [ARCHITECTURE],
            "runner_type": "generate",
            "get_sliding_window": lambda: None,
            "multimodal_config": SimpleNamespace(is_multimodal_pruning_enabled=lambda: False),
            "hf_text_config": text,
        },
        "parallel": {
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "cache": {"cache_dtype": "auto", "enable_prefix_caching": False, "block_size": 16},
        "scheduler": {
            "enable_chunked_prefill": False,
            "disable_hybrid_kv_cache_manager": False,
            "scheduler_cls": None,
        },
        "compilation": {"cudagraph_mode": SimpleNamespace(name="FULL_AND_PIECEWISE")},
    }
    whole: dict[str, Any] = {"speculative": None, "lora": None, "kv_transfer": None}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part][field] = value
        else:
            whole[part] = value
    made = {name: SimpleNamespace(**values) for name, values in parts.items()} | whole
    return SimpleNamespace(
        additional_config={"st3": {"policy": policy}},
        **{f"{name}_config": value for name, value in made.items()},
    )


def test_what_fits_is_taken() -> None:
    assert list(settings.obstacles(config())) == []
    assert list(settings.advice(config())) == []
    assert settings.require(config()) is not None


REFUSED = {
    "model__architectures": (["GPT2LMHeadModel"], "LLaVA 1.5, LLaVA-NeXT, Qwen2-VL"),
    "model__runner_type": ("pooling", "--runner"),
    "model__multimodal_config": (
        SimpleNamespace(is_multimodal_pruning_enabled=lambda: True),
        "--video-pruning-rate",
    ),
    "model__get_sliding_window": (lambda: 512, "--disable-sliding-window"),
    "parallel__pipeline_parallel_size": (2, "--pipeline-parallel-size 1"),
    "parallel__data_parallel_size": (2, "one server per replica"),
    "parallel__decode_context_parallel_size": (2, "--decode-context-parallel-size 1"),
    "parallel__prefill_context_parallel_size": (2, "--prefill-context-parallel-size 1"),
    "parallel__use_ubatching": (True, "--enable-dbo"),
    "speculative": (object(), "--speculative-config"),
    "lora": (object(), "--enable-lora"),
    "kv_transfer": (object(), "--kv-transfer-config"),
    "cache__cache_dtype": ("fp8", "--kv-cache-dtype auto"),
    "scheduler__disable_hybrid_kv_cache_manager": (True, "--disable-hybrid-kv-cache-manager"),
    "scheduler__scheduler_cls": ("my.Scheduler", "--scheduler-cls"),
    "compilation__cudagraph_mode": (SimpleNamespace(name="FULL"), "FULL_AND_PIECEWISE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_remedy(name: str) -> None:
    value, remedy = REFUSED[name]
    with pytest.raises(ValueError, match="st3 cannot trim with these settings") as refused:
        settings.require(config(**{name: value}))
    assert remedy in str(refused.value)


def test_all_that_does_not_fit_is_named_at_once() -> None:
    both = {"lora": object(), "parallel__pipeline_parallel_size": 2}
    assert len(list(settings.obstacles(config(**both)))) == 2


def test_windows_that_a_model_does_not_use_are_none() -> None:
    text = SimpleNamespace(num_hidden_layers=24, use_sliding_window=False)
    unused = {"model__get_sliding_window": lambda: 512, "model__hf_text_config": text}
    assert list(settings.obstacles(config(**unused))) == []


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("scheduler__enable_chunked_prefill", True, "--no-enable-chunked-prefill"),
        ("cache__enable_prefix_caching", True, "--no-enable-prefix-caching"),
        ("cache__block_size", 128, "--block-size"),
    ],
)
def test_what_costs_is_said(name: str, value: Any, flag: str) -> None:
    (said,) = settings.advice(config(**{name: value}))
    assert flag in said


# Options --------------------------------------------------------------------------------------


def test_who_does_not_ask_gets_nothing() -> None:
    assert settings.read(None) is None
    assert settings.read({}) is None
    assert settings.read({"other": {}}) is None


def test_the_default_policy_is_one_that_runs_there() -> None:
    asked = settings.read({"st3": {}})
    assert asked is not None
    assert str(asked.policy) == "balanced"


@pytest.mark.parametrize("policy", ["balanced:budget=35%", "grid:budget=0.35", "fastv:budget=0.35"])
def test_a_budget_is_the_share_that_is_held(policy: str) -> None:
    asked = settings.read({"st3": {"policy": policy}})
    assert asked is not None
    plan = asked.plan(24)
    assert plan is not None
    assert plan.mean_kept(2880, 16) / 2880 == pytest.approx(0.35, abs=0.01)
    assert plan.score is not None


def test_a_budget_may_be_an_option_of_its_own() -> None:
    asked = settings.read({"st3": {"budget": "35%"}})
    assert asked == settings.read({"st3": {"policy": "balanced:budget=35%"}})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("fastv", "write {"),
        (
            {"polices": "fastv"},
            "unknown option 'polices': use policy or budget",
        ),
        ({"policy": 3}, "policy must be a string"),
        ({"budget": "much"}, "st3: "),
        ({"policy": "nonsense"}, "st3: unknown policy 'nonsense'"),
        ({"policy": "fastv", "layers_per_group": 0}, "whole number from 1"),
        ({"policy": "fastv", "layers_per_group": True}, "whole number from 1"),
        ({"policy": "fastv", "layers_per_group": 5}, "does not divide this model's 24 layers"),
        ({"policy": "fastv:layer=30"}, "24 decoder layers"),
        ({"policy": "balanced:budget=1%"}, "cannot be had"),
        ({"policy": "pyramiddrop:own_layer=true"}, "own_layer"),
        ({"policy": "dycoke:budget=30%"}, "policy 'dycoke' cannot run inside of vLLM"),
    ],
)
def test_options_are_checked(asked: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        settings.require(SimpleNamespace(**{**vars(config()), "additional_config": {"st3": asked}}))


POLICIES_REFUSED = {
    "feather": "rotary",
    "dart": "keys",
    "visionzip": "tower",
    "scope": "tower",
    "hiprune": "tower",
    "vispruner": "tower",
    "vscan": "tower",
    "thirds": "tower",
    "sparsevlm": "text-raters",
    "transprune": "last query row",
    "v2drop": "hidden-change",
    "evs": "not tested",
    "mmr": "not tested",
    "vidcom2": "not tested",
    "dycoke": "ranking anew",
    "st3:rerank_every=4": "ranking anew",
    "fastv:score=text-rows": "last query row",
}


@pytest.mark.parametrize("policy", POLICIES_REFUSED)
def test_policies_that_cannot_run_are_refused_by_name(policy: str) -> None:
    name = policy.partition(":")[0]
    with pytest.raises(ValueError, match=f"policy {name!r} cannot run inside of vLLM") as refused:
        settings.require(config(policy))
    assert POLICIES_REFUSED[policy] in str(refused.value)


@pytest.mark.parametrize(
    "policy",
    ["st3", "st3-7b", "st3-13b", "balanced", "fastv", "pyramiddrop", "vtw", "keynorm", "grid",
     "random", "divprune", "cdpruner", "none"],
)  # fmt: skip
def test_policies_that_can_run_are_taken(policy: str) -> None:
    assert settings.require(config(policy)) is not None


@pytest.mark.parametrize("policy", sorted({*available(), *presets()}))
def test_a_reason_is_found_for_whatever_is_refused(policy: str) -> None:
    """Of policies that come later, too."""
    why = settings.unsupported(parse(policy))
    assert why is None or why.endswith(("hand out", "there", "keep", "over", "keys"))


# Models that are loaded -----------------------------------------------------------------------


class Layer:
    """A decoder layer of vLLM."""

    def __init__(self, backend: str = "FLASH_ATTN", window: int | None = None) -> None:
        named = SimpleNamespace(get_name=lambda: backend)
        found = SimpleNamespace(attn_backend=named, sliding_window=window)
        self.self_attn = SimpleNamespace(attn=found)

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> None: ...


class Parallel(Layer):
    """One with another signature."""

    def forward(self, hidden_states: Any, positions: Any) -> None: ...  # type: ignore[override]


def test_layers_and_backends_that_are_known_are_taken() -> None:
    assert [layers._problem(Layer(name)) for name in attention.BACKENDS] == [None] * 3


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Layer("FLASHINFER"), "FLASHINFER: use --attention-backend FLASH_ATTN or TRITON_ATTN"),
        (Layer(window=128), "sliding windows"),
        (Parallel(), "(Parallel) take hidden_states, positions"),
    ],
)
def test_others_are_refused_when_the_model_is_loaded(layer: Layer, words: str) -> None:
    assert words in str(layers._problem(layer))


# The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"), [("{", "is not JSON"), ("[1]", "must be a JSON object")]
)
def test_check_reads_engine_args(given: str, words: str) -> None:
    done = CliRunner().invoke(app, ["check", "model", "--engine-args", given])
    assert isinstance(done.exception, CliError)
    assert words in str(done.exception)
