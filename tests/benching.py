"""What the tests of the benchmark share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from st3.tools.bench import (
    bound,
    prompts,
)

CPU = torch.device("cpu")
VOCAB = 128  # of the shape "tiny"


def prompt(batch: int = 1, visual: int = 24, text: int = 8, ragged: bool = False) -> prompts.Prompt:
    rows = (prompts.ragged if ragged else prompts.uniform)(batch, visual, text)
    return prompts.build(rows, VOCAB, CPU)


def logits(model: Any, made: prompts.Prompt) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=made.ids, attention_mask=made.mask, logits_to_keep=1)
    return out.logits[:, -1]  # type: ignore[no-any-return]


def chosen_tokens(model: Any, made: prompts.Prompt, tokens: int = 6) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        input_ids=made.ids, attention_mask=made.mask, max_new_tokens=tokens
    )
    return out[:, -tokens:]


@contextmanager
def small_bandwidth() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bound._BYTES, "cpu", 1 << 20)
        yield
