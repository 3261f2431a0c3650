"""Scheduler side: which requests are trimmed, and what that saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from st3.vllm.plan import Plan
from st3.vllm.prompt import Prompt

#: Why a request passed untrimmed.
TEXT, SMALL, CHUNKED = "text", "small", "chunked"  # and st3.vllm.prompt.WHOLE


@dataclass
class Entry:
    """A request that holds slots, or asks for its first ones.

    Attributes:
        trims: what it was found to be when it last asked for first slots.
        counted: whether the counters know of it.
    """

    prompt: Prompt
    trims: bool = False
    counted: bool = False


@dataclass
class Ledger:
    """The requests of one scheduler.

    Attributes:
        counters: running totals, by name; see :mod:`st3.vllm.stats`.
        told: what :meth:`news` has told of them.
    """

    plan: Plan
    block: int
    entries: dict[str, Entry] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)

    def admit(self, request: Any) -> None:
        """Note a request of vLLM before it is queued."""
        params = request.sampling_params
        whole = params is not None and params.prompt_logprobs is not None
        prompt = Prompt.of(request.num_prompt_tokens, request.mm_features, whole)
        self.entries[request.request_id] = Entry(prompt)
        if self.plan.can_drop(prompt.n_visual, self.block):
            # What a block of a trimmed request holds depends on its question, not on its prefix
            # alone; and a prompt whose head is cached is not computed in one piece.
            request.skip_reading_prefix_cache = True

    def asks(self, request_id: str, computed: int, new: int) -> None:
        """A request that holds no slots asks for some: find out whether it is trimmed."""
        entry = self.entries.get(request_id)
        if entry is not None:
            entry.trims = self.plan.trims(entry.prompt, computed, new, self.block)

    def got(self, request_id: str) -> None:
        """It got them."""
        entry = self.entries.get(request_id)
        if entry is None or entry.counted:
            return
        entry.counted = True
        prompt, n_visual = entry.prompt, sum(entry.prompt.images)
        self._count("visual_tokens", n_visual)
        if entry.trims:
            self._count("requests_trimmed")
            kept = round(self.plan.mean_kept(n_visual, self.block))
        else:
            self._count(f"requests_passed_{self._why_not(prompt)}")
            kept = n_visual
        self._count("visual_tokens_kept", kept)

    def _why_not(self, prompt: Prompt) -> str:
        if not prompt.runs:
            return TEXT
        if prompt.never:
            return prompt.never
        return CHUNKED if self.plan.can_drop(prompt.n_visual, self.block) else SMALL

    def trims(self, request_id: str) -> bool:
        entry = self.entries.get(request_id)
        return entry is not None and entry.trims

    def empty_blocks(self, request_id: str, group: int, computed: int = 0) -> int:
        """Blocks at the head of a request that a KV cache group has no use for.

        Args:
            computed: the request's tokens that are in the cache; fewer than its prompt's while that
                is being computed.
        """
        entry = self.entries.get(request_id)
        if entry is None or not entry.trims:
            return 0
        prompt = entry.prompt
        step = max(0, computed - prompt.length + 1)
        slots = self.plan.group_skipped(group, prompt.n_visual, step, self.block)
        return slots // self.block

    def spared(self, blocks: int) -> None:
        """So many blocks were not allocated."""
        self._count("blocks_spared", blocks)

    def freed(self, blocks: int) -> None:
        """So many blocks went back to the pool before their request ended."""
        self._count("blocks_freed", blocks)

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self.entries.pop(request_id, None)

    def news(self) -> dict[str, int]:
        """By how much the counters have grown since this was last asked."""
        grown = {name: of - self.told.get(name, 0) for name, of in self.counters.items()}
        self.told = dict(self.counters)
        return {name: by for name, by in grown.items() if by}

    def _count(self, name: str, by: int = 1) -> None:
        if by:
            self.counters[name] = self.counters.get(name, 0) + by
