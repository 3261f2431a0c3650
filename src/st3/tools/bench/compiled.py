"""Compiled decode steps (CUDA graphs), untrimmed and trimmed alike."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import st3
from st3.cost import TextDims, decode_bytes
from st3.engine.plan import lay_out
from st3.engine.wiring import Wiring
from st3.methods.policies import Policy
from st3.tools.bench import prompts
from st3.tools.bench.measure import generation
from st3.tools.bench.models import Subject
from st3.tools.bench.suite import Workload


@dataclass(frozen=True)
class CompiledDecode:
    """Decode steps of one policy in a compiled graph.

    Attributes:
        tpot: median seconds of a step.
        bytes: weights and live KV entries that a step in the middle of the generation reads.
    """

    label: str
    tpot: float
    bytes: int

    def over_bound(self, bandwidth: float) -> float:
        """Step time over the time in which memory can deliver its bytes."""
        return self.tpot / (self.bytes / bandwidth)


def compiled_decode(
    subject: Subject,
    workload: Workload,
    policies: Sequence[Policy],
    options: str | dict[str, Any] = "reduce-overhead",
) -> list[CompiledDecode]:
    """Measure each policy by itself, attached once: attaching anew would compile anew. The untimed
    first generation has the timed ones' length, so that all graphs are there."""
    dims = TextDims.from_config(subject.model.config)
    prompt = prompts.build(workload.rows(), subject.vocab, subject.device)
    results = []
    for policy in policies:
        trimmer = st3.trim(
            subject.model,
            policy,
            own_cache=True,
            visual_mask=prompt.visual,
            compile_decode=options,
        )
        with trimmer:
            generation(subject.model, prompt, workload.new_tokens)
            rounds = [
                generation(subject.model, prompt, workload.new_tokens)
                for _ in range(workload.repeats)
            ]
        steps = [step for one in rounds for step in one.steps]
        read = decode_bytes(
            dims,
            workload.text,
            workload.visual,
            lay_out(policy, Wiring(dims.sources, dims.in_order)),
            max(1, workload.new_tokens // 2),
            subject.dtype,
            workload.batch,
        )
        results.append(CompiledDecode(str(policy), statistics.median(steps), read))
    return results
