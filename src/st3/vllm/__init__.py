"""st3 inside of vLLM: a plug-in for an unmodified vLLM, inert unless an engine is configured.

>>> LLM(model, additional_config={"st3": {"policy": "st3"}})  # doctest: +SKIP

A policy's counts depend on a request's visual tokens and its decode step alone, so vLLM's scheduler
and its workers derive them without a word to each other. Who lives where:

    settings    what ``additional_config`` says; what is refused, with reasons
    plan        counts in whole blocks, and which layers share a block table
    prompt      where a request's images stand
    spec        scheduler: a KV cache spec and manager whose head blocks go back to the pool
    ledger      scheduler: which requests are trimmed, and what that saved
    columns     worker: what is left of one trimmed prompt, and how it ranks
    batch       worker: the rows of one forward pass that are still there
    metadata    worker: attention metadata of a layer that holds fewer tokens
    attention   worker: the platform's attention backend, subclassed
    layers      worker: decoder layers that drop rows
    follower    worker: follows a model runner from batch to batch
    hooks       every private method of vLLM that is wrapped, and the versions that have it
    stats       counters in vLLM's log and /metrics
"""

from __future__ import annotations


def register() -> None:
    """Entry point ``vllm.general_plugins``: vLLM calls it once in each of its processes."""
    from st3.vllm import hooks

    hooks.install()
