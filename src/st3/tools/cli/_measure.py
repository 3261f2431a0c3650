"""Answer once, or answer untrimmed and trimmed in turn and time both."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import TextStreamer

from st3.tools.cli._loading import Loaded, quiet

WARM_UP_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and its times, in seconds.

    ttft: from the call of generate(), the image encoder included, to the first token.
    tpot: mean time of each token after the first; None for an answer of one token.
    """

    text: str
    tokens: int
    ttft: float
    tpot: float | None
    total: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "answer": self.text,
            "new_tokens": self.tokens,
            "ttft_ms": 1e3 * self.ttft,
            "tpot_ms": None if self.tpot is None else 1e3 * self.tpot,
            "total_ms": 1e3 * self.total,
        }


class Clock(TextStreamer):
    """Notes when each new token arrives on the host, and passes finished text on."""

    next_tokens_are_prompt: bool

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        if self.on_text is None:
            self.next_tokens_are_prompt = False  # decoding text nobody reads would be timed too
        else:
            super().put(value)

    def end(self) -> None:
        if self.on_text is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None:
            self.on_text(text)


def answer(
    loaded: Loaded,
    inputs: Any,
    max_new_tokens: int,
    trimmer: AbstractContextManager[Any] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Greedy generation, timed. trimmer: attached for this run only; on_text: gets the stream."""
    clock = Clock(loaded.tokenizer, on_text)
    with quiet(), trimmer or nullcontext():
        start = time.perf_counter()
        output = loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, streamer=clock
        )
    times = clock.times
    new = output[0, output.shape[1] - len(times) :]
    return Answer(
        text=loaded.tokenizer.decode(new, skip_special_tokens=True).strip(),
        tokens=len(times),
        ttft=times[0] - start,
        tpot=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        total=times[-1] - start,
    )


def compare(
    loaded: Loaded,
    inputs: Any,
    max_new_tokens: int,
    trimmer: AbstractContextManager[Any],
    runs: int,
    on_run: Callable[[], None] = lambda: None,
) -> tuple[Answer, Answer]:
    """Untrimmed and trimmed answer, with median times of `runs` runs of each.

    One short unmeasured run of each comes first; the measured ones alternate, so that a change
    of the machine's load meets both. on_run is called after each of the 2 * runs + 2 generations.
    """

    def once(which: AbstractContextManager[Any] | None, tokens: int = max_new_tokens) -> Answer:
        result = answer(loaded, inputs, tokens, which)
        on_run()
        return result

    once(None, min(WARM_UP_TOKENS, max_new_tokens))
    once(trimmer, min(WARM_UP_TOKENS, max_new_tokens))
    pairs = [(once(None), once(trimmer)) for _ in range(runs)]
    return _median([a for a, _ in pairs]), _median([b for _, b in pairs])


def _median(answers: list[Answer]) -> Answer:
    tpots = [a.tpot for a in answers if a.tpot is not None]
    return dataclasses.replace(
        answers[0],
        ttft=statistics.median(a.ttft for a in answers),
        tpot=statistics.median(tpots) if tpots else None,
        total=statistics.median(a.total for a in answers),
    )
