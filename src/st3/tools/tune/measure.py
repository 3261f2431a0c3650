"""What a policy costs on a machine: seconds to the first token and of the whole answer, and bytes
of KV entries, beside the untrimmed model's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import st3
from st3.methods.policies import Policy
from st3.tools.common.chats import ask
from st3.tools.common.clock import Marks
from st3.tools.common.images import open_image
from st3.tools.eval.data import TURNS, Item
from st3.tools.eval.runs import Runner

AIMS = ("end-to-end", "prefill", "memory")
ROUNDS, ROWS = 5, 8


@dataclass(frozen=True)
class Cost:
    """Of one policy; times are medians over the rounds.

    Attributes:
        first, total: seconds to the first tokens of the batches, vision tower included, and to
            their last ones.
        first_ratio, total_ratio: over the untrimmed model's of the same round.
        kv, kv_allocated: bytes of KV entries at the end of the answers: what attention still reads,
            and the buffers that hold them.
        kv_ratio: of the bytes read over the untrimmed model's, mean over the steps.
    """

    first: float
    total: float
    first_ratio: float
    total_ratio: float
    kv: int
    kv_allocated: int
    kv_ratio: float

    def of(self, aim: str) -> float:
        """Of the untrimmed model's cost, what is left of that which is to be saved."""
        return {
            "prefill": self.first_ratio, "memory": self.kv_ratio, "end-to-end": self.total_ratio
        }[aim]  # fmt: skip


class _Lead(LogitsProcessor):
    """Marks each step, and has ``tokens`` [B, n] chosen: as many steps for every policy."""

    def __init__(self, tokens: Tensor, marks: Marks) -> None:
        self.tokens, self.marks, self.step = tokens, marks, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.mark()
        wanted = self.tokens[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, wanted, 0.0)


@dataclass
class _Run:
    first: float = 0.0
    total: float = 0.0
    kv: int = 0
    allocated: int = 0
    kept: float = 0.0
    untrimmed: float = 0.0


def costs(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policies: Sequence[Policy],
    max_new_tokens: Callable[[Item], int],
    rounds: int = ROUNDS,
    on_run: Callable[[], None] = lambda: None,
) -> list[Cost]:
    """The cost of each policy on the first items of each kind, led along the untrimmed answers.

    Policies take turns, so that a change of the machine's load meets all of them. The first of them
    is what ratios are of.
    """
    runner = Runner(model, processor)
    batches = []
    for kind in dict.fromkeys(item.kind for item in items if item.kind != TURNS):
        some = [item for item in items if item.kind == kind][:ROWS]
        reference = runner.reference(some, max_new_tokens(some[0]))
        batches.append((some, reference.tokens))
    runs: list[list[_Run]] = [[] for _ in policies]
    for turn in range(rounds + 1):
        for policy, own in zip(policies, runs, strict=True):
            made = _Run()
            for some, tokens in batches:
                _once(runner, some, policy, tokens, made)
            if turn:  # the first round warms up
                own.append(made)
            on_run()
    return [_cost(own, runs[0]) for own in runs]


def steps(policies: int, rounds: int = ROUNDS) -> int:
    """How often :func:`costs` reports progress."""
    return policies * (rounds + 1)


def _once(
    runner: Runner, items: Sequence[Item], policy: Policy, tokens: Tensor, made: _Run
) -> None:
    marks = Marks(runner.model.device)
    shown = [ask([open_image(p) for p in item.images], item.turns[0].question) for item in items]
    inputs = runner.encode(shown)
    with st3.trim(runner.model, policy) as trimmer:
        marks.mark()
        runner.model.generate(
            **inputs,
            max_new_tokens=tokens.shape[1],
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([_Lead(tokens, marks)]),
        )
        report = trimmer.report
    spans = marks.seconds()
    made.first += spans[0]
    made.total += sum(spans)
    made.kv += report.kv_live_bytes
    made.allocated += report.kv_allocated_bytes
    made.kept += report.kv_mean_ratio * report.kv_untrimmed_bytes
    made.untrimmed += report.kv_untrimmed_bytes


def _cost(own: Sequence[_Run], base: Sequence[_Run]) -> Cost:
    def median(of: Callable[[_Run, _Run], float]) -> float:
        return statistics.median(of(a, b) for a, b in zip(own, base, strict=True))

    last = own[-1]
    return Cost(
        first=median(lambda a, b: a.first),
        total=median(lambda a, b: a.total),
        first_ratio=median(lambda a, b: a.first / b.first),
        total_ratio=median(lambda a, b: a.total / b.total),
        kv=last.kv,
        kv_allocated=last.allocated,
        kv_ratio=last.kept / last.untrimmed,
    )
