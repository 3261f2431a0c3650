"""Worker side: a batch's attention metadata as the layers of one part see it."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from st3.vllm.batch import Batch
from st3.vllm.columns import to_device
from st3.vllm.plan import Part


class Tables:
    """Block tables and lengths of one part, moved past the empty slots at each request's head.

    Decoding needs nothing else: to the kernel a trimmed request is a shorter one. On an accelerator
    the results lie in buffers that keep their place, because CUDA graphs read them there.
    """

    def __init__(self, requests: int, device: torch.device) -> None:
        self.requests = requests
        self.fixed = device.type != "cpu"
        self._table: Tensor | None = None
        self._lengths: Tensor | None = None
        self._columns: Tensor | None = None

    def past(self, common: Any, skips: list[int], block: int) -> Any:
        """vLLM's ``CommonAttentionMetadata`` without the first ``skips`` slots of each request.

        Args:
            block: slots of a block as the kernel counts them.
        """
        if not any(skips) and not self.fixed:
            return common
        table, lengths = common.block_table_tensor, common.seq_lens
        rows, width = table.shape
        device = table.device
        padded = [*skips, *[0] * (rows - len(skips))]
        if self._table is None or self._lengths is None or self._table.shape[1] != width:
            self._table = table.new_zeros(max(self.requests, rows), width)
            self._lengths = lengths.new_zeros(max(self.requests, rows))
            self._columns = torch.arange(width, device=device)
        assert self._columns is not None  # made with the table
        skip = to_device(padded, device)
        index = (self._columns[None] + (skip // block)[:, None]).clamp_(max=width - 1)
        moved, left = self._table[:rows], self._lengths[:rows]
        torch.gather(table, 1, index, out=moved)
        torch.sub(lengths, skip.to(lengths.dtype), out=left)
        changes: dict[str, Any] = {
            "block_table_tensor": moved,
            "seq_lens": left,
            "_num_computed_tokens_cache": None,
        }
        bound = common.seq_lens_cpu_upper_bound
        if bound is not None:
            bound = bound - torch.tensor(padded, dtype=bound.dtype)
            changes["seq_lens_cpu_upper_bound"] = bound
            if any(skips):
                changes["max_seq_len"] = max(int(bound.max()), 1)
        return common.replace(**changes)


def without_rows(common: Any, batch: Batch, part: Part) -> Any:
    """``common`` of the rows that a part computes: a prompt's kept rows take the last of its slots,
    whichever tokens they are, so this is known before any of them is chosen."""
    drops = batch.drops(part)
    if not any(drops):
        return common
    shares = batch.shares
    lengths = [share.length - drop for share, drop in zip(shares, drops, strict=True)]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=common.query_start_loc_cpu.dtype)
    device = common.query_start_loc.device
    slots = torch.cat(
        [
            common.slot_mapping[share.start + drop : share.start + share.length]
            for share, drop in zip(shares, drops, strict=True)
        ]
    )
    batch.slots[part.number] = slots
    return common.replace(
        query_start_loc=to_device(starts.tolist(), device).to(starts.dtype),
        query_start_loc_cpu=starts,
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(lengths),
        slot_mapping=slots,
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
