"""Worker side: the platform's attention backend, subclassed.

Its kernels are untouched. The builder makes metadata for each part of a KV cache group, the
implementation takes its layer's, shows queries and keys to the score, and writes a prompt's keys
and values once more in the order in which annealing will free them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from st3.vllm.batch import CURRENT
from st3.vllm.metadata import Tables, without_rows
from st3.vllm.plan import Part, Plan

#: Attention backends of vLLM that were read for this (and CPU_ATTN run).
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")

PARTS = "st3_parts"  # attribute of a group's metadata: that of each of its parts


@functools.cache
def backend(base: Any) -> Any:
    """A subclass of an attention backend of vLLM that knows parts."""
    name = f"St3{base.__name__}"
    members = {
        "__module__": __name__,
        "__qualname__": name,
        "get_builder_cls": staticmethod(lambda: builder(base.get_builder_cls())),
        "get_impl_cls": staticmethod(lambda: implementation(base.get_impl_cls())),
    }
    return type(name, (base,), members)


@functools.cache
def builder(base: Any) -> Any:
    """A subclass of a metadata builder."""

    class St3Builder(base):
        # Each group has its own lengths: none is another's with a different table.
        supports_update_block_table = False

        def __init__(
            self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, **more: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **more)
            self.st3_parts: tuple[Part, ...] = kv_cache_spec.plan.parts_of(kv_cache_spec.group)
            # Builders keep buffers of their own, so each part has one.
            self.st3_others = [
                base(kv_cache_spec, layer_names, vllm_config, device, **more)
                for _ in self.st3_parts[1:]
            ]
            requests = vllm_config.scheduler_config.max_num_seqs
            self.st3_tables = [Tables(requests, device) for _ in self.st3_parts]

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **more: Any):  # type: ignore[no-untyped-def]
            batch = CURRENT.batch
            built = {}
            makers = [super().build, *(other.build for other in self.st3_others)]
            for part, make, tables in zip(self.st3_parts, makers, self.st3_tables, strict=True):
                common = common_attn_metadata
                skips = batch.skips(part) if batch is not None else []
                common = tables.past(common, skips, self.kv_cache_spec.block_size)
                if batch is not None and batch.prefills:
                    common = without_rows(common, batch, part)
                built[part.number] = make(0, common, *args, **more)
            first = built[self.st3_parts[0].number]
            setattr(first, PARTS, built)
            return first

    return St3Builder


@functools.cache
def implementation(base: Any) -> Any:
    """A subclass of an attention implementation."""

    class St3Impl(base):
        st3_layer: int
        st3_part: Part

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            *args: Any,
            **more: Any,
        ) -> Any:
            own = getattr(attn_metadata, PARTS, {}).get(self.st3_part.number, attn_metadata)
            out = super().forward(layer, query, key, value, kv_cache, own, *args, **more)
            batch = CURRENT.batch
            if batch is not None and batch.prefills and attn_metadata is not None:
                softcap = getattr(self, "logits_soft_cap", None)
                batch.attended(self.st3_layer, query, key, self.scale, softcap)
                if batch.orders(self.st3_layer):
                    for rows, slots in batch.reorder(own.slot_mapping):
                        self._store(layer, key[rows], value[rows], kv_cache, slots)
            return out

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
        ) -> None:
            batch = CURRENT.batch
            if batch is not None:
                slot_mapping = batch.slots.get(self.st3_part.number, slot_mapping)
            self._store(layer, key, value, kv_cache, slot_mapping)

        def _store(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
        ) -> None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slots)

    return St3Impl


def problem(attention: Any) -> str | None:
    """Why one of vLLM's attention layers cannot be trimmed; None if it can."""
    name = attention.attn_backend.get_name()
    if name not in BACKENDS:
        return f"attention backend {name}: use --attention-backend {' or '.join(BACKENDS[1:])}"
    if attention.sliding_window is not None:
        return "sliding windows count slots that trimming leaves out"
    return None


def attach(attention: Any, plan: Plan, layer: int) -> None:
    """Make one of vLLM's attention layers a layer of the plan."""
    from st3.vllm.spec import St3Spec

    part = next(part for part in plan.parts if part.first <= layer < part.end)
    spec = attention.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: Any) -> Any:
        return St3Spec.of(spec(vllm_config), plan, part.group)

    attention.get_kv_cache_spec = get_kv_cache_spec
    attention.attn_backend = backend(attention.attn_backend)
    kind: Any = type(attention.impl)
    attention.impl.__class__ = implementation(kind)
    attention.impl.st3_layer, attention.impl.st3_part = layer, part


def mean_over_ranks(score: Tensor) -> Tensor:
    """The mean over tensor parallel ranks of what each has found with its heads. Gathered, not
    reduced: every rank adds in the same order, so that no rounding tells them apart."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return score
    gathered: Tensor = group.all_gather(score.contiguous(), dim=0)
    return torch.stack(gathered.chunk(group.world_size)).mean(dim=0)
