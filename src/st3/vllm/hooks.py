"""Every private method of vLLM that is wrapped, and the versions that have it.

Of vLLM's classes only three constructors and the making of a config are wrapped, and these do
nothing unless an engine's ``additional_config`` asks for st3. All else is wrapped on the one
scheduler and model runner of an engine that does.
"""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from st3.vllm import settings

if TYPE_CHECKING:
    from st3.vllm.follower import Follower

#: Versions of vLLM whose private methods are as below.
SUPPORTED = SpecifierSet(">=0.32,<0.33")

#: What of vLLM is used beyond its documented interface, by class: wrapped here or called by
#: :mod:`st3.vllm.spec`. Where one is missing, an engine that asks for st3 does not start.
PRIVATE = {
    ("vllm.engine.arg_utils", "EngineArgs"): ("create_engine_config",),
    ("vllm.v1.core.sched.scheduler", "Scheduler"): (
        "add_request",
        "_free_blocks",
        "make_stats",
        "shutdown",
    ),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager"): ("allocate_slots",),
    ("vllm.v1.core.single_type_kv_cache_manager", "FullAttentionManager"): (
        "get_num_blocks_to_allocate",
        "allocate_new_blocks",
        "remove_skipped_blocks",
        "cache_blocks",
        "_remove_blocks_in_range",
    ),
    ("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry"): ("register", "_ensure_registered"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"): (
        "load_model",
        "get_model",
        "_build_attention_metadata",
    ),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"): (
        "load_model",
        "get_model",
        "prepare_attn",
        "prepare_dummy_attn",
    ),
}

logger = logging.getLogger("vllm.st3")  # below vllm's, so that its handler shows it

Method = Callable[..., Any]


def version() -> str:
    """The installed vLLM's version, without a build's name."""
    from vllm import __version__

    return str(__version__).partition("+")[0]


def version_problem() -> str | None:
    """Why the installed vLLM does not fit; None if it does."""
    found = version()
    if not SUPPORTED.contains(found, prereleases=True):
        return f"st3 supports vLLM {SUPPORTED}, installed is {found}: install one of these"
    absent = ", ".join(_absent())
    if absent:
        return (
            f"this vLLM {found} lacks {absent}, which st3 wraps: install one of PyPI's {SUPPORTED}"
        )
    return None


def _absent() -> Iterator[str]:
    """What of :data:`PRIVATE` is not there. A module that cannot be imported has no say: model
    runner V2 is one where there is no Triton, and does not run there."""
    for (module, owner), names in PRIVATE.items():
        try:
            cls = getattr(importlib.import_module(module), owner, None)
        except (ImportError, AttributeError):
            continue
        yield from (f"{module}.{owner}.{name}" for name in names if not hasattr(cls, name))


def install() -> None:
    """Wrap what makes an engine's config; once, however often vLLM loads its plug-ins. The rest
    follows when a config asks for st3, or at once in the processes that vLLM starts, which get a
    ready-made config."""
    _wrap("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", _config)
    if multiprocessing.parent_process() is not None or "ray" in sys.modules:
        install_engine()


def install_engine() -> None:
    """Wrap the constructors of what makes an engine."""
    _wrap("vllm.v1.core.sched.scheduler", "Scheduler", "__init__", _scheduler)
    _wrap("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "__init__", _runner_v1)
    _wrap("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "__init__", _runner_v2)


def _wrap(module: str, owner: str, name: str, make: Callable[[Method], Method]) -> None:
    try:
        cls = getattr(importlib.import_module(module), owner)
        inner = getattr(cls, name)
    except (ImportError, AttributeError):
        return  # _asked() says so, if an engine asks for st3
    if not hasattr(inner, "__st3__"):
        outer = functools.wraps(inner)(make(inner))
        outer.__st3__ = True  # type: ignore[attr-defined]
        setattr(cls, name, outer)


def _asked(config: Any) -> settings.Settings | None:
    """The settings of an engine, if it asks for st3 and all fits."""
    if settings.read(config.additional_config) is None:
        return None
    problem = version_problem()
    if problem:
        raise RuntimeError(problem)
    return settings.require(config)


def _config(inner: Method) -> Method:
    """Refuse in the process that the user started, before a model is loaded."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = inner(self, *args, **kwargs)
        if _asked(config) is not None:
            install_engine()
            for advice in settings.advice(config):
                logger.warning("st3: %s", advice)
        return config

    return create_engine_config


# Scheduler ------------------------------------------------------------------------------------


def _scheduler(inner: Method) -> Method:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, vllm_config, *args, **kwargs)
        if _asked(vllm_config) is not None:
            _hook_scheduler(self)

    return __init__


def _hook_scheduler(scheduler: Any) -> None:
    from st3.vllm.ledger import Ledger
    from st3.vllm.spec import St3Manager
    from st3.vllm.stats import line, send

    manager = scheduler.kv_cache_manager
    managers = [
        one for one in manager.coordinator.single_type_managers if isinstance(one, St3Manager)
    ]
    if not managers:
        return  # a policy that drops nothing
    ledger = Ledger(managers[0].kv_cache_spec.plan, managers[0].block_size)
    for one in managers:
        one.ledger = ledger
    scheduler.st3 = ledger
    add, free, allocate = scheduler.add_request, scheduler._free_blocks, manager.allocate_slots
    stats, stop = scheduler.make_stats, scheduler.shutdown

    def add_request(request: Any) -> None:
        if request.request_id not in scheduler.requests:
            ledger.admit(request)
        add(request)

    def _free_blocks(request: Any) -> None:
        free(request)
        ledger.forget(request.request_id)

    def allocate_slots(request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        first = not managers[0].req_to_blocks.get(request.request_id)
        if first:
            ledger.asks(request.request_id, request.num_computed_tokens, num_new_tokens)
        blocks = allocate(request, num_new_tokens, *args, **kwargs)
        if first and blocks is not None:
            ledger.got(request.request_id)
        return blocks

    def make_stats(*args: Any, **kwargs: Any) -> Any:
        made = stats(*args, **kwargs)
        if made is not None:
            send(ledger.news(), made)
        return made

    def shutdown(*args: Any, **kwargs: Any) -> None:
        logger.info("%s", line(ledger.counters))
        stop(*args, **kwargs)

    scheduler.shutdown = shutdown
    scheduler.add_request, scheduler._free_blocks = add_request, _free_blocks
    scheduler.make_stats, manager.allocate_slots = make_stats, allocate_slots


# Workers --------------------------------------------------------------------------------------


def _runner_v1(inner: Method) -> Method:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, vllm_config, *args, **kwargs)
        asked = _asked(vllm_config)
        if asked is None:
            return
        follower = _follow(self, asked, lambda: self.requests)
        build = self._build_attention_metadata

        def _build_attention_metadata(*args: Any, **kwargs: Any) -> Any:
            dummy = kwargs.get("num_scheduled_tokens") is None
            batch = self.input_batch
            if dummy:
                follower.idle()
            else:
                follower.begin(
                    batch.req_ids,
                    self.query_start_loc.np,
                    batch.num_computed_tokens_cpu,
                    batch.num_prompt_tokens,
                    lambda name, i: self.requests[name].mm_features,
                    lambda name, i: _wants_all(self.requests[name].sampling_params),
                )
            return build(*args, **kwargs)

        self._build_attention_metadata = _build_attention_metadata

    return __init__


def _runner_v2(inner: Method) -> Method:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, vllm_config, *args, **kwargs)
        asked = _asked(vllm_config)
        if asked is None:
            return
        follower = _follow(self, asked, lambda: self.req_states.req_id_to_index)
        prepare, dummy = self.prepare_attn, self.prepare_dummy_attn

        def features(name: str, i: int) -> Any:
            return self.encoder_cache.mm_features.get(name) if self.encoder_cache else None

        def wants_all(name: str, i: int) -> bool:
            worker = self.prompt_logprobs_worker
            return worker is not None and bool(worker.uses_prompt_logprobs[i])

        def prepare_attn(input_batch: Any) -> Any:
            index = input_batch.idx_mapping_np
            follower.begin(
                input_batch.req_ids,
                input_batch.query_start_loc_np,
                input_batch.num_computed_tokens_np,
                self.req_states.prompt_len.np[index],
                features,
                lambda name, i: wants_all(name, int(index[i])),
            )
            return prepare(input_batch)

        def prepare_dummy_attn(*args: Any, **kwargs: Any) -> Any:
            follower.idle()
            return dummy(*args, **kwargs)

        self.prepare_attn, self.prepare_dummy_attn = prepare_attn, prepare_dummy_attn

    return __init__


def _follow(
    runner: Any, asked: settings.Settings, alive: Callable[[], Collection[str]]
) -> Follower:
    """A follower of a model runner, which takes the model once it is loaded."""
    from st3.vllm.follower import Follower

    follower = Follower(asked, alive, lambda: int(runner.cache_config.block_size))
    load = runner.load_model

    def load_model(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        follower.attach(runner.get_model())

    runner.load_model = load_model
    return follower


def _wants_all(params: Any) -> bool:
    return params is not None and params.prompt_logprobs is not None
