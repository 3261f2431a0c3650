"""What is wrapped of vLLM: which versions, what is left alone, and model runner V2, which needs a
GPU, by a stand-in."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("vllm")

from st3.tools.cli._common import CliError
from st3.tools.cli.vllm import app
from st3.vllm import hooks, settings
from st3.vllm.batch import CURRENT
from st3.vllm.stats import line
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


def test_a_build_that_lacks_what_is_wrapped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    where = ("vllm.v1.core.sched.scheduler", "Scheduler")
    monkeypatch.setitem(hooks.PRIVATE, where, ("add_request", "add_requests_in_bulk"))
    with pytest.raises(RuntimeError, match=r"lacks .*Scheduler\.add_requests_in_bulk"):
        hooks._asked(config(st3={"policy": "st3"}))


def methods_of(module: str, owner: str) -> dict[str, list[str]]:
    """Methods of a class of vLLM and their arguments, read off its file: what needs Triton cannot
    be imported here."""
    (root,) = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr]
    tree = ast.parse(Path(root, *module.split(".")[1:]).with_suffix(".py").read_text())
    cls = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner)
    return {
        node.name: [argument.arg for argument in node.args.args]
        for node in cls.body
        if isinstance(node, ast.FunctionDef)
    }


def test_model_runner_v2_has_what_is_wrapped() -> None:
    where = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")
    found = methods_of(*where)
    assert set(hooks.PRIVATE[where]) <= set(found)
    assert found["prepare_attn"][:2] == ["self", "input_batch"]
    (root,) = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr]
    runner = Path(root, "v1/worker/gpu/model_runner.py").read_text()
    for read in ("self.encoder_cache", "self.prompt_logprobs_worker", "self.req_states"):
        assert f"{read} = " in runner or f"{read}: " in runner
    source = "".join(path.read_text() for path in Path(root, "v1/worker/gpu").rglob("*.py"))
    for read in (
        "idx_mapping_np", "query_start_loc_np", "num_computed_tokens_np", "uses_prompt_logprobs",
        "self.mm_features", "self.req_id_to_index", "self.prompt_len",
    ):  # fmt: skip
        assert read in source, read


def test_check_names_an_argument_that_vllm_does_not_have() -> None:
    done = CliRunner().invoke(app, ["check", "model", "--engine-args", '{"block_sise": 16}'])
    assert isinstance(done.exception, CliError)
    assert "block_sise" in str(done.exception)


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

    def get_model(self) -> Any:
        text = SimpleNamespace(model=SimpleNamespace(layers=[None] * 4))
        return SimpleNamespace(get_language_model=lambda: text)

    def prepare_attn(self, input_batch: Any) -> str:
        return "attention"

    def prepare_dummy_attn(self) -> str:
        return "dummy"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    asked = settings.read({"st3": {"policy": "fastv:layer=1,drop=0.5"}})
    monkeypatch.setattr(hooks, "_asked", lambda config: asked)
    made: Any = RunnerV2.__new__(RunnerV2)
    monkeypatch.setattr("st3.vllm.layers.attach", lambda model, plan: None)
    hooks._runner_v2(RunnerV2.__init__)(made, None)
    made.load_model()
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


def test_an_id_that_is_used_again_is_another_request(runner: Any) -> None:
    runner.prepare_attn(step([0, 0], [80, 5]))
    runner.encoder_cache.mm_features = {}
    runner.prepare_attn(step([32, 5], [48, 1]))  # of text now, with 32 tokens from the prefix cache
    share = CURRENT.batch.shares[0]
    assert (share.trims, share.prompt.n_visual) == (False, 0)


# Statistics ------------------------------------------------------------------------------------


def test_counters_reach_metrics_and_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """As deltas: each message reaches one of the front ends, whose figures are added up."""
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.stats import SchedulerStats

    from st3.vllm.ledger import Ledger
    from st3.vllm.plan import Plan
    from st3.vllm.stats import Stats, send

    engine = SimpleNamespace(
        additional_config={"st3": {}}, model_config=SimpleNamespace(served_model_name="counted")
    )
    stats, ledger = Stats(engine), Ledger(Plan("fastv", 4, 2), 16)
    for blocks in (3, 0, 4):
        ledger.spared(blocks)
        sent = SchedulerStats()
        send(ledger.news(), sent)
        assert sent.num_kv_fetch_reqs_by_stage == {}  # else vLLM's log shows fetches
        stats.record(sent, None)
    labels = {"model_name": "counted", "engine": "0"}
    assert REGISTRY.get_sample_value("st3:blocks_spared_total", labels) == 7
    said: list[str] = []
    monkeypatch.setattr("st3.vllm.stats.logger.info", lambda text, of: said.append(text % of))
    stats.log()
    stats.log()  # nothing new
    assert said == [line({"blocks_spared": 7})]


def test_the_line_of_the_log() -> None:
    assert line(
        {
            "requests_trimmed": 2,
            "requests_passed_text": 1,
            "visual_tokens": 200,
            "visual_tokens_kept": 50,
            "blocks_spared": 9,
            "blocks_freed": 4,
        }
    ) == (
        "st3: 2 requests trimmed, passed {'text': 1}; visual tokens kept 25.0%; blocks spared 9, "
        "freed early 4"
    )
