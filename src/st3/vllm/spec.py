"""Scheduler side: a KV cache spec per group of layers, and a manager that gives its empty head
blocks back to the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from st3.vllm.ledger import Ledger
from st3.vllm.plan import Plan


@dataclass(frozen=True, kw_only=True)
class St3Spec(FullAttentionSpec):
    """Full attention of one group of layers, which has a block table of its own.

    The group's number keeps vLLM from joining or splitting groups: all have ``plan.group_size``
    layers, hence blocks of the same bytes and no padding.
    """

    plan: Plan
    group: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, plan: Plan, group: int) -> St3Spec:
        """``spec``, as the given group has it."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**values, plan=plan, group=group)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(getattr(spec, "group", None) == self.group for spec in kv_cache_specs.values())

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different groups")  # what vLLM takes for "not alike"
        return replace(specs[0])


class St3Manager(FullAttentionManager):
    """Blocks of one group. A trimmed request's head is null blocks: in prefill those are never
    allocated, while decoding they go back to the pool one by one.

    Attributes:
        ledger: set by :mod:`st3.vllm.hooks` once the scheduler has its managers.
    """

    ledger: Ledger

    def __init__(self, kv_cache_spec: St3Spec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.group = kv_cache_spec.group

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        wanted = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        if self.req_to_blocks.get(request_id):
            return wanted
        return wanted - self.ledger.empty_blocks(request_id, self.group)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks, head = self.req_to_blocks[request_id], []
        if not blocks:
            head = [self._null_block] * self.ledger.empty_blocks(request_id, self.group)
            blocks.extend(head)
            self.ledger.spared(len(head))
        return head + super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        if not self.req_to_blocks.get(request_id):
            return
        empty = self.ledger.empty_blocks(request_id, self.group, processed_computed_tokens)
        before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, 0, empty)
        self.ledger.freed(self.block_pool.get_num_free_blocks() - before)

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        if not self.ledger.trims(request.request_id):
            super().cache_blocks(request, *args, **kwargs)


# The registry fills itself only while it is empty, so its own entries must come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(St3Spec, St3Manager, uniform_type_base_spec=St3Spec)
