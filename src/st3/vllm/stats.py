"""Front end: st3's counters in the log and /metrics of a vLLM server."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter
from vllm.v1.metrics.loggers import StatLoggerBase

from st3.vllm import settings
from st3.vllm.ledger import CHUNKED, SMALL, TEXT
from st3.vllm.prompt import WHOLE

#: What the counters' names begin with on their way from the scheduler to the front end.
PREFIX = "st3_"

COUNTERS = {
    "requests_trimmed": "Requests whose visual tokens were trimmed",
    f"requests_passed_{TEXT}": "Requests without an image or video",
    f"requests_passed_{SMALL}": "Requests whose visual tokens fill no block that could be freed",
    f"requests_passed_{CHUNKED}": "Requests that passed untrimmed: computed in chunks",
    f"requests_passed_{WHOLE}": "Requests that passed untrimmed: log-probabilities of the prompt",
    "visual_tokens": "Visual tokens of prompts",
    "visual_tokens_kept": "Visual tokens held after prefill, mean over the layers",
    "blocks_spared": "KV cache blocks that prompts did not take",
    "blocks_freed": "KV cache blocks that went back to the pool before their request ended",
}

logger = logging.getLogger("vllm.st3")


def send(news: Mapping[str, int], stats: Any) -> None:
    """Put growth of the counters into vLLM's scheduler statistics. Of their fields that reach the
    front end, this mapping of names to numbers is read for LoRA alone, which st3 refuses. Growth,
    not totals: each message reaches one of the API servers, whose figures are added up."""
    stats.running_lora_adapters.update({f"{PREFIX}{name}": by for name, by in news.items()})


def received(stats: Any) -> dict[str, int]:
    """What :func:`send` put there."""
    return {
        name.removeprefix(PREFIX): by
        for name, by in stats.running_lora_adapters.items()
        if name.startswith(PREFIX)
    }


def line(counters: Mapping[str, int]) -> str:
    """Running totals as one line of a log."""
    visual, kept = counters.get("visual_tokens", 0), counters.get("visual_tokens_kept", 0)
    passed = {
        why: count
        for why in (TEXT, SMALL, CHUNKED, WHOLE)
        if (count := counters.get(f"requests_passed_{why}", 0))
    }
    share = f"{kept / visual:.1%}" if visual else "none"
    return (
        f"st3: {counters.get('requests_trimmed', 0)} requests trimmed, passed {passed or 'none'}; "
        f"visual tokens kept {share}; blocks spared {counters.get('blocks_spared', 0)}, freed "
        f"early {counters.get('blocks_freed', 0)}"
    )


class Stats(StatLoggerBase):
    """Entry point ``vllm.stat_logger_plugins``; does nothing unless st3 is configured."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.on = settings.read(vllm_config.additional_config) is not None
        self.seen: dict[str, int] = {}
        self.logged: dict[str, int] = {}
        labels = {
            "model_name": vllm_config.model_config.served_model_name if self.on else "",
            "engine": str(engine_index),
        }
        self.counters = {
            name: _counter(name, text, tuple(labels)).labels(*labels.values())
            for name, text in (COUNTERS.items() if self.on else ())
        }

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if not self.on or scheduler_stats is None:
            return
        for name, by in received(scheduler_stats).items():
            self.counters[name].inc(by)
            self.seen[name] = self.seen.get(name, 0) + by

    def log(self) -> None:
        if self.seen != self.logged:
            self.logged = dict(self.seen)
            logger.info("%s", line(self.seen))

    def log_engine_initialized(self) -> None:
        pass


@functools.cache
def _counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
    """The counter of this name, made once in a process."""
    return Counter(f"st3:{name}", text, labels)
