"""What is wrapped of vLLM: which versions, what is left alone, and model runner V2, which needs a
GPU, by a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from st3.vllm import hooks, settings
from st3.vllm.batch import CURRENT
from tests.vllm.test_plan import feature


@pytest.fixture
def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "version", lambda: "0.99.1")


def config(**asked: Any) -> Any:
    return SimpleNamespace(additional_config=asked)


@pytest.mark.usefixtures("other_version")
def test_an_unknown_vllm_is_refused_in_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"st3 supports vLLM .*0\.32.*, installed is 0\.99\.1"):
        hooks._asked(config(st3={"policy": "st3"}))


@pytest.mark.usefixtures("other_version")
def test_an_unknown_vllm_is_left_alone_where_st3_is_not_asked_for() -> None:
    assert hooks._asked(config()) is None


def test_this_vllm_is_supported() -> None:
    assert hooks.version_problem() is None


def test_a_scheduler_that_is_not_configured_is_left_alone() -> None:
    """Nothing but constructors is wrapped on vLLM's classes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    hooks.install_engine()
    hooks.install()
    wrapped = {
        f"{cls.__name__}.{name}"
        for cls in (EngineArgs, KVCacheManager, Scheduler, GPUModelRunner)
        for name, value in vars(cls).items()
        if hasattr(value, "__st3__")
    }
    assert wrapped == {
        "EngineArgs.create_engine_config",
        "Scheduler.__init__",
        "GPUModelRunner.__init__",
    }


def test_installing_twice_wraps_once() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    hooks.install_engine()
    before = Scheduler.__init__
    hooks.install_engine()
    assert Scheduler.__init__ is before


class RunnerV2:
    """What the plug-in reads of model runner V2."""

    def __init__(self, vllm_config: Any) -> None:
        self.cache_config = SimpleNamespace(block_size=16)
        self.encoder_cache = SimpleNamespace(mm_features={"a": [feature((2, 65))]})
        self.prompt_logprobs_worker = SimpleNamespace(
            uses_prompt_logprobs=np.array([False, False, False])
        )
        self.req_states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.array([0, 80, 5])), req_id_to_index={"a": 1, "b": 2}
        )

    def load_model(self) -> None: ...

    def prepare_attn(self, input_batch: Any) -> str:
        return "attention"

    def prepare_dummy_attn(self) -> str:
        return "dummy"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    asked = settings.read({"st3": {"policy": "fastv:layer=1,drop=0.5"}})
    monkeypatch.setattr(hooks, "_asked", lambda config: asked)
    made: Any = RunnerV2.__new__(RunnerV2)
    follower = []
    inner = hooks._Follower.__init__

    def note(self: Any, *args: Any) -> None:
        inner(self, *args)
        follower.append(self)

    monkeypatch.setattr(hooks._Follower, "__init__", note)
    hooks._runner_v2(RunnerV2.__init__)(made, None)
    assert asked is not None
    follower[0].plan = asked.plan(4)
    yield made
    CURRENT.batch = None


def step(computed: list[int], new: list[int]) -> Any:
    return SimpleNamespace(
        req_ids=["a", "b"],
        idx_mapping_np=np.array([1, 2]),
        query_start_loc_np=np.array([0, *new]).cumsum(),
        num_computed_tokens_np=np.array(computed),
        query_start_loc=torch.tensor([0]),
    )


def test_model_runner_v2_prefills_and_decodes(runner: Any) -> None:
    assert runner.prepare_attn(step([0, 0], [80, 5])) == "attention"
    first, second = CURRENT.batch.shares
    assert (first.prompt.n_visual, first.trims, second.trims) == (64, True, False)
    assert CURRENT.batch.prefills
    runner.prepare_attn(step([80, 5], [1, 1]))
    assert not CURRENT.batch.prefills
    assert CURRENT.batch.skips(CURRENT.batch.plan.parts[-1]) == [32, 0]


def test_model_runner_v2_in_chunks(runner: Any) -> None:
    runner.prepare_attn(step([0, 0], [40, 5]))
    assert not CURRENT.batch.shares[0].trims
    runner.prepare_attn(step([40, 5], [40, 1]))
    assert not CURRENT.batch.shares[0].trims


def test_model_runner_v2_between_requests(runner: Any) -> None:
    runner.prepare_attn(step([0, 0], [80, 5]))
    assert runner.prepare_dummy_attn() == "dummy"
    assert CURRENT.batch is None


def test_model_runner_v2_and_probabilities_of_the_prompt(runner: Any) -> None:
    runner.prompt_logprobs_worker.uses_prompt_logprobs[1] = True
    runner.prepare_attn(step([0, 0], [80, 5]))
    assert not CURRENT.batch.shares[0].trims
