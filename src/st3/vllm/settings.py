"""What an engine's ``additional_config`` says of st3, and what cannot be combined with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from st3.methods import DEFAULT_IN_VLLM
from st3.methods.policies import Policy, check_model, parse, read_budget, with_budget
from st3.methods.policies.base import check_ranked
from st3.methods.scores import Attention, KeyNorm, Mixed, needs_of, stage_of
from st3.models import model_facts
from st3.vllm.plan import Plan

KEY = "st3"
OPTIONS = ("policy", "budget", "layers_per_group")

#: Scores of embeddings and places that are tested.
EARLY = ("grid", "uniform", "random", "divprune", "cdpruner")

#: Architectures (``architectures`` in config.json) that are tested, and how people call them.
FAMILIES = {
    "LlavaForConditionalGeneration": "LLaVA 1.5",
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
    "InternVLForConditionalGeneration": "InternVL (transformers layout)",
}


@dataclass(frozen=True)
class Settings:
    """What a user asked for.

    Attributes:
        policy: the policy.
        layers_per_group: layers that share a block table; None lets the plan choose.
    """

    policy: Policy
    layers_per_group: int | None = None

    def plan(self, num_layers: int) -> Plan | None:
        """The policy on a model; None if it drops nothing.

        Raises:
            ValueError: a policy or group size that does not fit so many layers, or a policy that
                cannot run inside of vLLM.
        """
        policy = with_budget(self.policy, num_layers)
        schedule = policy.schedule(num_layers)
        if not schedule.drops:
            return None
        why = unsupported(policy)
        if why:
            raise ValueError(
                f"st3: policy {policy.name!r} cannot run inside of vLLM: {why}. Use "
                f"{DEFAULT_IN_VLLM}, st3, fastv or grid"
            )
        check_ranked(policy, schedule)
        size = self.layers_per_group
        if size is None:
            return Plan.choose(str(policy), num_layers)
        if num_layers % size:
            raise ValueError(
                f"st3: layers_per_group={size} does not divide this model's {num_layers} layers"
            )
        return Plan(str(policy), num_layers, size)

    def plan_for(self, model_config: Any) -> Plan | None:
        """:meth:`plan` on a model of vLLM.

        Raises:
            ValueError: also a file's policy that was found for another model.
        """
        check_model(self.policy, model_facts(model_config.hf_config))
        return self.plan(model_config.hf_text_config.num_hidden_layers)


def read(additional_config: Any) -> Settings | None:
    """``{"st3": {"policy": "fastv:layer=2,drop=0.5"}}``, ``{"st3": {"policy": "policy.json"}}`` or
    ``{"st3": {"budget": 0.35}}``; None where st3 is not asked for, the default policy where
    ``{"st3": {}}`` names none.

    Raises:
        ValueError: an unknown option or policy.
    """
    asked = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if asked is None:
        return None
    if not isinstance(asked, dict):
        raise ValueError(
            f'st3: write {{"{KEY}": {{"policy": "{DEFAULT_IN_VLLM}"}}}}, got {asked!r}'
        )
    for name in asked:
        if name not in OPTIONS:
            raise ValueError(f"st3: unknown option {name!r}: use {' or '.join(OPTIONS)}")
    text, budget = asked.get("policy", DEFAULT_IN_VLLM), asked.get("budget")
    if not isinstance(text, str):
        raise ValueError(f"st3: policy must be a string such as {DEFAULT_IN_VLLM!r}, got {text!r}")
    try:
        policy = parse(text, **({} if budget is None else {"budget": read_budget(budget)}))
    except ValueError as error:
        raise ValueError(f"st3: {error}") from None
    size = asked.get("layers_per_group")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"st3: layers_per_group must be a whole number from 1, got {size!r}")
    return Settings(policy, size)


def unsupported(policy: Policy) -> str | None:
    """Why a policy cannot run inside of vLLM; None if it can. Its counts must follow from the
    schedule, and its score from what one layer has in hand."""
    score: Any = policy.scorer()
    if policy.rerank:
        return "ranking anew while decoding reads attention weights that its kernels do not keep"
    if policy.per_head:
        return "the heads of a layer share its block table"
    missing = needs_of(score) - {"grids"}
    if missing:
        return f"its score needs {', '.join(sorted(missing))}, which vLLM does not hand out"
    if stage_of(score) == "embeds":
        return None if score.name in EARLY else f"the score {score.name!r} is not tested there"
    if getattr(score, "lazy", 0):
        return "scores that layers share are not carried over"
    if isinstance(score, Mixed):
        score = score.attention
    if isinstance(score, KeyNorm) or (isinstance(score, Attention) and score.last_row):
        return None
    return f"the score {score.name!r} reads more than the prompt's last query row and the keys"


def obstacles(config: Any) -> Iterator[str]:
    """Why an engine with this ``VllmConfig`` cannot be trimmed, with the remedy, one by one."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    known = [name for name in model.architectures if name in FAMILIES]
    if not known:
        names = ", ".join(FAMILIES.values())
        yield f"model {model.architectures[0]} is not among the tested families: {names}"
    multimodal = model.multimodal_config
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled():
        yield "videos that vLLM prunes itself: leave out --video-pruning-rate"
    if model.runner_type != "generate":
        yield "only generation is trimmed: leave out --runner"
    if model.get_sliding_window() is not None and getattr(
        model.hf_text_config, "use_sliding_window", True
    ):
        yield "sliding windows count slots that trimming leaves out: use --disable-sliding-window"
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism: use --pipeline-parallel-size 1 (or tensor parallelism)"
    if parallel.data_parallel_size > 1:
        yield "data parallelism inside of one server: start one server per replica"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"context parallelism: use --{name.replace('_', '-')} 1"
    if getattr(parallel, "use_ubatching", False):
        yield "microbatches: leave out --enable-dbo and --ubatch-size"
    if config.speculative_config is not None:
        yield "speculative decoding: leave out --speculative-config"
    if config.lora_config is not None:
        yield "LoRA maps adapters to rows that trimming removes: leave out --enable-lora"
    if config.kv_transfer_config is not None:
        yield (
            "KV connectors move whole prompts: leave out --kv-transfer-config and "
            "--kv-offloading-size"
        )
    scheduler = config.scheduler_config
    if scheduler.disable_hybrid_kv_cache_manager:
        yield (
            "each group of layers has a block table of its own: leave out "
            "--disable-hybrid-kv-cache-manager"
        )
    if scheduler.scheduler_cls is not None:
        yield "a scheduler of your own: leave out --scheduler-cls"
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        yield f"a quantised KV cache ({cache.cache_dtype}): use --kv-cache-dtype auto"
    mode = config.compilation_config.cudagraph_mode
    if mode is not None and mode.name == "FULL":
        yield (
            "full CUDA graphs of prefills: use --compilation-config "
            '\'{"cudagraph_mode": "FULL_AND_PIECEWISE"}\''
        )


def advice(config: Any) -> Iterator[str]:
    """What an engine could be told to trim more, or to trim at all."""
    cache = config.cache_config
    if config.scheduler_config.enable_chunked_prefill:
        yield (
            "prompts that are computed in chunks pass untrimmed: use --no-enable-chunked-prefill, "
            "or a larger --max-num-batched-tokens"
        )
    if cache.enable_prefix_caching:
        yield (
            "requests with images neither read nor fill the prefix cache, text keeps it: use "
            "--no-enable-prefix-caching if all have images"
        )
    if cache.block_size is not None and cache.block_size > 32:
        yield (
            f"visual tokens are dropped in whole blocks of {cache.block_size}: use --block-size 16 "
            "or 32"
        )


def require(config: Any) -> Settings | None:
    """The settings of an engine, checked; None where st3 is not asked for.

    Raises:
        ValueError: with every obstacle, one line each.
    """
    settings = read(config.additional_config)
    if settings is None:
        return None
    found = list(obstacles(config))
    if found:
        raise ValueError("st3 cannot trim with these settings: " + "; ".join(found))
    settings.plan_for(config.model_config)
    return settings
