"""What st3 gives on transformers, with the counts that vLLM's blocks allow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import st3
from st3.methods.policies import Policy, parse
from st3.methods.schedule import Schedule
from st3.methods.scores import Score
from st3.vllm.plan import Plan
from tests.vllm.engine import Ask, metadata

#: Log-probabilities of what two engines compute alike, in fp32.
EQUAL = 2e-3


@dataclass(frozen=True)
class InBlocks(Schedule):
    """A schedule whose counts are rounded up so that whole blocks are left out."""

    block: int = 32

    def kept(self, layer: int, n_visual: int) -> int:
        return self._up(self._exact.kept(layer, n_visual), n_visual)

    def visible(self, layer: int, n_visual: int, step: int) -> int:
        return self._up(self._exact.visible(layer, n_visual, step), n_visual)

    @cached_property
    def _exact(self) -> Schedule:
        return Schedule(self.shares, self.anneal, self.anneal_from)

    def _up(self, count: int, n_visual: int) -> int:
        return n_visual - (n_visual - count) // self.block * self.block


@dataclass(frozen=True)
class Rounded(Policy):
    """A policy with such counts."""

    inner: Policy

    name = "rounded"

    def schedule(self, num_layers: int) -> Schedule:
        of = self.inner.schedule(num_layers)
        return InBlocks(of.shares, of.anneal, of.anneal_from)

    def scorer(self) -> Score:
        return self.inner.scorer()


@dataclass
class Answer:
    """Token ids and their log-probabilities."""

    ids: list[int]
    logprobs: list[float]


class Library:
    """A checkpoint on transformers."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()

    def inputs(self, ask: Ask) -> Any:
        given: dict[str, Any] = {"images": ask.images} if ask.images else {}
        if ask.videos:
            known = [metadata(video) for video in ask.videos]
            for of in known:
                del of["do_sample_frames"]
            given |= {
                "videos": [list(video) for video in ask.videos],
                "video_metadata": known,
                "do_sample_frames": False,
            }
        return self.processor(text=ask.text, return_tensors="pt", **given)

    @torch.no_grad()
    def answer(self, ask: Ask, policy: str | None) -> Answer:
        """Greedy, one request alone."""
        inputs = self.inputs(ask)
        asked = parse(policy) if policy else parse("none")
        new = ask.params.get("max_tokens", 24)
        with st3.trim(self.model, Rounded(asked)):
            out = self.model.generate(
                **inputs,
                max_new_tokens=new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits = torch.cat(out.logits).float().log_softmax(-1)
        return Answer(ids, logits[torch.arange(len(ids)), torch.tensor(ids)].tolist())


def held(plan: Plan, length: int, n_visual: int, computed: int, block: int = 32) -> list[int]:
    """Blocks of each KV cache group that a request holds, whose ``computed`` tokens are in the
    cache before a step and who gets one more."""
    step = max(0, computed - length + 1) if computed else 0
    all_blocks = -(-max(length, computed + 1) // block)
    return [
        all_blocks - plan.group_skipped(group, n_visual, step, block) // block
        for group in range(plan.groups)
    ]
