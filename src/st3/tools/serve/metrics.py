"""What is counted, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from st3.tools.serve.ticket import Finished

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The figures of one engine and its app; each has a registry of its own."""

    def __init__(self, engine: Any) -> None:
        self.registry = registry = CollectorRegistry()
        for name, text, of in (
            ("running", "Requests that decode", "running"),
            ("waiting", "Requests that are queued", "waiting"),
            ("batches", "Batches that decode one after another", "lanes"),
            ("kv_budget_bytes", "KV bytes that requests may hold", "budget"),
            ("kv_reserved_bytes", "KV bytes promised to running requests", "reserved"),
            ("kv_allocated_bytes", "KV bytes of the batches' buffers", "allocated"),
        ):
            gauge = Gauge(f"st3_{name}", text, registry=registry)
            gauge.set_function(lambda of=of: getattr(engine.stats(), of))  # type: ignore[misc]
        self._requests = Counter(
            "st3_requests", "Requests by HTTP status", ["status"], registry=registry
        )
        self._prompt = Counter("st3_prompt_tokens", "Prompt tokens, untrimmed", registry=registry)
        self._visual = Counter("st3_visual_tokens", "Visual tokens of prompts", registry=registry)
        self._kept = Counter(
            "st3_visual_tokens_kept",
            "Visual tokens that entered a decoder layer, mean over the layers",
            registry=registry,
        )
        self._tokens = Counter("st3_generated_tokens", "Tokens generated", registry=registry)
        self._queued = _histogram("queue", "Seconds in the queue", _SECONDS, registry)
        self._ttft = _histogram("ttft", "Seconds to the first token", _SECONDS, registry)
        self._tpot = _histogram(
            "tpot", "Seconds of each token behind the first", _TOKEN_SECONDS, registry
        )
        self._total = _histogram("request", "Seconds from submission to end", _SECONDS, registry)

    def responded(self, status: int) -> None:
        """A response was begun, or a stream failed with what would have been this status."""
        self._requests.labels(str(status)).inc()

    def finished(self, answer: Finished) -> None:
        """An answer is complete."""
        new = len(answer.token_ids)
        self._prompt.inc(answer.prompt_tokens)
        self._visual.inc(answer.visual_tokens)
        self._kept.inc(answer.visual_tokens * answer.mean_share)
        self._tokens.inc(new)
        self._queued.observe(answer.queued)
        self._ttft.observe(answer.ttft)
        self._total.observe(answer.total)
        if new > 1:
            self._tpot.observe((answer.total - answer.ttft) / (new - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _histogram(
    name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry
) -> Histogram:
    return Histogram(f"st3_{name}_seconds", text, buckets=buckets, registry=registry)
