"""Runs engines of vLLM in a process of their own: `python -m tests.vllm.engine JOBS RESULTS`.

vLLM sets up its process for itself (threads, distributed state), so the tests, which also run
transformers, start it apart, and several engines one after another, as its import takes long.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


@dataclass
class Ask:
    """One request.

    Attributes:
        text: its prompt.
        images: its pictures.
        videos: its videos, [frames, height, width, 3] each.
        params: of vLLM's ``SamplingParams``; greedy, 24 tokens and log-probabilities by default.
        at: the step before which it is sent.
        abort: the step before which it is aborted.
    """

    text: str
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    at: int = 0
    abort: int | None = None


@dataclass
class Job:
    """One engine and what it is asked.

    Attributes:
        model: a checkpoint's folder.
        policy: of st3; None: not configured.
        asks: the requests.
        options: of vLLM's ``LLM``, over those that all have.
        st3: further options of st3.
        schedules_ahead: force async scheduling, which vLLM switches off on CPUs.
        script: what to do with the engine: a function of this module.
    """

    model: Path
    policy: str | None
    asks: list[Ask]
    options: dict[str, Any] = field(default_factory=dict)
    st3: dict[str, Any] = field(default_factory=dict)
    schedules_ahead: bool = False
    script: str = "drive"


@dataclass
class Result:
    """What an engine gave.

    Attributes:
        ids, logprobs: of each request, for each of its answers.
        prompts: token ids of each request's prompt.
        cached: tokens of each that came from the prefix cache.
        steps: before each step: requests running, blocks in use, and each request's held blocks by
            KV cache group.
        in_use: blocks in use at the end.
        usage: share of the blocks in use at the end, as vLLM's metrics have it.
        remembered: requests that st3's ledger knows at the end.
        counters: st3's.
        preemptions: how often a request was preempted.
        refused: why requests were not taken, by their number.
        error: why there is no answer.
    """

    ids: list[list[list[int]]] = field(default_factory=list)
    logprobs: list[list[list[float]]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    steps: list[tuple[int, int, dict[str, list[int]]]] = field(default_factory=list)
    in_use: int = 0
    usage: float = 0.0
    remembered: int = 0
    blocks: int = 0
    groups: list[int] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    refused: dict[int, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def tokens(self) -> list[list[int]]:
        """The first answer of each request; none of those that were aborted."""
        return [answers[0] if answers else [] for answers in self.ids]


def run(jobs: dict[str, Job], folder: Path, **environment: str) -> dict[str, Result]:
    """Run engines one after another in a new process."""
    asked, found = folder / "jobs.pickle", folder / "results.pickle"
    asked.write_bytes(pickle.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.engine", str(asked), str(found)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    results: dict[str, Result] = pickle.loads(found.read_bytes())
    return results


def engine(job: Job) -> Any:
    """An ``LLM`` for a job."""
    from vllm import LLM

    options: dict[str, Any] = {
        "model": str(job.model),
        "dtype": "float32",
        "block_size": 32,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_seqs": 16,
        "max_model_len": 2048,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 1 << 28,
        "skip_mm_profiling": True,
        "seed": 0,
        "disable_log_stats": False,
        **job.options,
    }
    if job.policy is not None:
        options["additional_config"] = {"st3": {"policy": job.policy, **job.st3}}
    with _ahead() if job.schedules_ahead else contextlib.nullcontext():
        return LLM(**options)


@contextlib.contextmanager
def _ahead() -> Iterator[None]:
    from vllm.engine.arg_utils import EngineArgs

    inner = EngineArgs.create_engine_config

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        config = inner(*args, **kwargs)
        config.scheduler_config.async_scheduling = True
        return config

    EngineArgs.create_engine_config = create_engine_config
    yield
    EngineArgs.create_engine_config = inner


def metadata(video: Any) -> dict[str, Any]:
    """Of a video all of whose frames are there."""
    frames = len(video)
    return {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def prompt(ask: Ask) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if ask.images:
        data["image"] = ask.images
    if ask.videos:
        data["video"] = [(video, metadata(video)) for video in ask.videos]
    return {"prompt": ask.text, "multi_modal_data": data} if data else {"prompt": ask.text}


def params(ask: Ask) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    given = {"temperature": 0, "max_tokens": 24, "logprobs": 0, "ignore_eos": True, **ask.params}
    return SamplingParams(**given, output_kind=RequestOutputKind.FINAL_ONLY)


def drive(llm: Any, job: Job) -> Result:
    """Step until all is answered, and look into the scheduler where it is in this process."""
    result, done, step = Result(), dict[int, Any](), 0
    front, scheduler = llm.llm_engine, _scheduler(llm)
    if scheduler is not None:
        _count_preemptions(scheduler, result)
    waiting = dict(enumerate(job.asks))
    while waiting or front.has_unfinished_requests():
        for i in [i for i, ask in waiting.items() if ask.at <= step]:
            ask = waiting.pop(i)
            try:
                front.add_request(str(i), prompt(ask), params(ask))
            except Exception as error:  # the tests look at it
                result.refused[i] = f"{type(error).__name__}: {error}"
        gone = [str(i) for i, ask in enumerate(job.asks) if ask.abort == step]
        if gone:
            front.abort_request(gone)
        for out in front.step():
            if out.finished:
                done[int(out.request_id)] = out
        if scheduler is not None:
            result.steps.append(_look(scheduler))
        step += 1
    for i in range(len(job.asks)):
        _take(result, done.get(i))
    usage = [m.value for m in llm.get_metrics() if m.name == "vllm:kv_cache_usage_perc"]
    result.usage = float(usage[0])
    if scheduler is not None:
        _finish(scheduler, result)
    return result


def beam(llm: Any, job: Job) -> Result:
    """Beam search of two beams for each request."""
    from vllm.sampling_params import BeamSearchParams

    result = Result()
    asked = BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True)
    for out in llm.beam_search([prompt(ask) for ask in job.asks], asked):
        result.ids.append([list(sequence.tokens) for sequence in out.sequences])
    scheduler = _scheduler(llm)
    if scheduler is not None:
        _finish(scheduler, result)
    return result


def start(llm: Any, job: Job) -> Result:
    """Nothing: the engine starts, or says why not."""
    return Result()


def _take(result: Result, out: Any) -> None:
    answers = out.outputs if out is not None else []
    result.ids.append([list(answer.token_ids) for answer in answers])
    result.prompts.append(list(out.prompt_token_ids) if out is not None else [])
    result.cached.append((out.num_cached_tokens or 0) if out is not None else 0)
    result.logprobs.append(
        [
            [step[token].logprob for step, token in zip(a.logprobs, a.token_ids, strict=True)]
            for a in answers
            if a.logprobs
        ]
    )


def _scheduler(llm: Any) -> Any:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return getattr(core, "scheduler", None)


def _count_preemptions(scheduler: Any, result: Result) -> None:
    inner = scheduler._preempt_request

    def preempt(*args: Any, **kwargs: Any) -> Any:
        result.preemptions += 1
        return inner(*args, **kwargs)

    scheduler._preempt_request = preempt


def _look(scheduler: Any) -> tuple[int, int, dict[str, list[int]]]:
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    held = {
        request.request_id: [
            sum(not block.is_null for block in one.req_to_blocks.get(request.request_id, ()))
            for one in managers
        ]
        for request in scheduler.running
    }
    return len(scheduler.running), _in_use(scheduler), held


def _in_use(scheduler: Any) -> int:
    pool = scheduler.kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


def _finish(scheduler: Any, result: Result) -> None:
    result.in_use = _in_use(scheduler)
    result.blocks = scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    result.groups = [len(group.layer_names) for group in groups]
    ledger = getattr(scheduler, "st3", None)
    result.counters = dict(ledger.counters) if ledger is not None else {}
    result.remembered = len(ledger.entries) if ledger is not None else 0


def main() -> None:
    asked, found = map(Path, sys.argv[1:])
    results = {}
    for name, job in pickle.loads(asked.read_bytes()).items():
        llm = None
        try:
            llm = engine(job)
            results[name] = globals()[job.script](llm, job)
        except Exception as error:  # the tests look at it
            results[name] = Result(error=f"{type(error).__name__}: {error}")
            traceback.print_exc()
        if llm is not None:
            with contextlib.suppress(AttributeError):
                llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    found.write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    # Under its own name, so that what is pickled is not of the module "__main__".
    from tests.vllm.engine import main as entry

    entry()
