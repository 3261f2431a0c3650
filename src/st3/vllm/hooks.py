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
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from packaging.specifiers import SpecifierSet

from st3.methods.scores import needs_of
from st3.vllm import settings

#: Versions of vLLM whose private methods are as below.
SUPPORTED = SpecifierSet(">=0.32,<0.33")

logger = logging.getLogger("vllm.st3")  # below vllm's, so that its handler shows it

Method = Callable[..., Any]


def version() -> str:
    """The installed vLLM's version, without a build's name."""
    from vllm import __version__

    return str(__version__).partition("+")[0]


def version_problem() -> str | None:
    """Why the installed vLLM does not fit; None if it does."""
    found = version()
    if SUPPORTED.contains(found, prereleases=True):
        return None
    return f"st3 supports vLLM {SUPPORTED}, installed is {found}: install one of these"


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
        if version_problem():  # else: model runner V2 where there is no Triton
            logger.warning("%s; %s.%s is not there", version_problem(), module, owner)
        return
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
    from st3.vllm.stats import line, stats_of

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
            # A mapping of names to numbers that reaches vLLM's front end, which reads known names.
            made.num_kv_fetch_reqs_by_stage.update(stats_of(ledger.counters))
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
        follower = _Follower(self, asked, lambda: self.requests)
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
        follower = _Follower(self, asked, lambda: self.req_states.req_id_to_index)
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


def _wants_all(params: Any) -> bool:
    return params is not None and params.prompt_logprobs is not None


class _Follower:
    """Follows one model runner: lays the plan on its model, and notes each batch before its
    attention metadata is built.

    Attributes:
        alive: gives the ids of the requests that the runner knows.
        known: what was found of each when its first tokens were computed.
    """

    def __init__(
        self, runner: Any, asked: settings.Settings, alive: Callable[[], Collection[str]]
    ) -> None:
        from st3.vllm.batch import Share

        self.runner, self.asked, self.alive = runner, asked, alive
        self.plan: Any = None
        self.known: dict[str, Share] = {}
        load = runner.load_model

        def load_model(*args: Any, **kwargs: Any) -> None:
            load(*args, **kwargs)
            self._attach(runner.get_model())

        runner.load_model = load_model

    def _attach(self, model: Any) -> None:
        from st3.vllm import layers

        self.plan = self.asked.plan(len(model.get_language_model().model.layers))
        if self.plan is None:
            return
        layers.attach(model, self.plan)
        logger.info(
            "st3 trims with %s: %d KV cache groups of %d layers",
            self.plan.policy,
            self.plan.groups,
            self.plan.group_size,
        )

    def idle(self) -> None:
        """A pass without requests follows."""
        from st3.vllm.batch import CURRENT

        CURRENT.batch = None

    def begin(
        self,
        names: Any,
        starts: Any,
        computed: Any,
        lengths: Any,
        features: Callable[[str, int], Any],
        wants_all: Callable[[str, int], bool],
    ) -> None:
        """A pass over these requests follows.

        Args:
            names: the requests' ids.
            starts: first row of each, and the end.
            computed: tokens of each that are in the cache.
            lengths: tokens of each one's prompt.
            features, wants_all: multimodal features of a request, and whether it wants every row.
        """
        from st3.vllm.attention import mean_over_ranks
        from st3.vllm.batch import CURRENT, Batch, Share
        from st3.vllm.prompt import Prompt

        if self.plan is None:
            return
        shares, block = [], self.runner.cache_config.block_size
        for i, name in enumerate(names):
            start, done = int(starts[i]), int(computed[i])
            new = int(starts[i + 1]) - start
            share = self.known.get(name)
            if share is None or done == 0:
                found = features(name, i)
                prompt = Prompt.of(int(lengths[i]), found, wants_all(name, i))
                if "grids" in needs_of(self.plan.score):
                    prompt = replace(prompt, grids=prompt.grids_from(found))
                trims = self.plan.trims(prompt, done, new, block)
                share = Share(start, new, done, prompt, trims)
            share.start, share.length, share.computed = start, new, done
            shares.append(share)
            self.known[name] = share
        if len(self.known) > 2 * len(self.alive()) + 1024:
            self.known = {name: self.known[name] for name in self.alive() if name in self.known}
        CURRENT.batch = Batch(self.plan, shares, block, mean_over_ranks)
