"""What rows of different lengths cost: a ragged batch against a uniform one of the same columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from st3.tools.bench import prompts
from st3.tools.bench.clock import Deadline, in_turn, median
from st3.tools.bench.measure import Generation, generation
from st3.tools.bench.methods import Method
from st3.tools.bench.models import Subject
from st3.tools.bench.suite import Workload


@dataclass
class RaggedRow:
    """Times of one method on both batches, one entry for each round."""

    label: str
    uniform: list[Generation] = field(default_factory=list)
    ragged: list[Generation] = field(default_factory=list)

    def slower(self, what: str) -> float | None:
        """Median over the rounds of ragged / uniform: of "first" (the prefill) or "total"."""
        pairs = zip(self.ragged, self.uniform, strict=True)
        return median([getattr(a, what) / getattr(b, what) for a, b in pairs])


def against_uniform(
    subject: Subject,
    workload: Workload,
    methods: Sequence[Method],
    on_run: Callable[[], None] = lambda: None,
    deadline: Deadline | None = None,
) -> list[RaggedRow]:
    """Generate on both batches in turn, with all methods. The ragged batch is padded to the columns
    of the uniform one (:func:`st3.tools.bench.prompts.ragged`), so that both hold tensors of
    one size."""
    made = {}
    for ragged in (False, True):
        rows = dataclasses.replace(workload, ragged=ragged).rows()
        made[ragged] = prompts.build(rows, subject.vocab, subject.device)

    def call(method: Method, prompt: prompts.Prompt, tokens: int) -> Callable[[], Generation]:
        def run() -> Generation:
            with method.attach(subject.model, prompt):
                return generation(subject.model, prompt, tokens)

        return run

    table = {method.label: RaggedRow(method.label) for method in methods}
    calls = {}
    for method in methods:
        for ragged, prompt in made.items():
            call(method, prompt, 2)()
            calls[f"{method.label} {ragged}"] = call(method, prompt, workload.new_tokens)
    samples = in_turn(calls, workload.repeats, on_run, deadline)
    for method in methods:
        table[method.label].uniform = samples[f"{method.label} {False}"]
        table[method.label].ragged = samples[f"{method.label} {True}"]
    return list(table.values())
