"""NVIDIA's kvpress on the same shapes, with the same timing code.

kvpress (0.5.5) asks for transformers < 5.3, st3 for 5.16 or newer, so that this runs in an
environment of its own, in which st3 is not installed and does not trim:

    python3 -m venv .venv-kvpress
    .venv-kvpress/bin/pip install torch kvpress typer rich pillow matplotlib
    PYTHONPATH=src .venv-kvpress/bin/python benchmarks/kvpress_compare.py --threads 1

Its rows are compared with the untouched model of that environment; compare ratios with those of
``st3 bench``, not milliseconds. kvpress computes the whole prefill and drops KV entries behind it,
text and image tokens alike, so that it cannot make the prefill faster; compression ratios are
chosen so that what stays is about ST3's mean over the layers (0.65 dropped) or FastV's (0.5).
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from st3.tools.bench import (
    SHAPES,
    Method,
    Workload,
    from_shape,
    run,
    untouched,
)
from st3.tools.bench.files import save
from st3.tools.bench.prompts import Prompt
from st3.tools.bench.report import as_markdown
from st3.tools.common.conditions import conditions
from st3.tools.common.load import device_of, dtype_of

RESULTS = Path(__file__).with_name("results")


def presses() -> dict[str, Any]:
    """Label -> press. SnapKV looks back over 16 queries, as the prompt's text may be short."""
    try:
        from kvpress import ExpectedAttentionPress, KnormPress, SnapKVPress
    except ImportError as error:
        sys.exit(f"error: {error}; install kvpress as this file's first lines say")
    made: dict[str, Any] = {}
    for ratio in (0.5, 0.65):
        made[f"kvpress SnapKV {ratio}"] = SnapKVPress(compression_ratio=ratio, window_size=16)
        made[f"kvpress Knorm {ratio}"] = KnormPress(compression_ratio=ratio)
        made[f"kvpress ExpectedAttention {ratio}"] = ExpectedAttentionPress(compression_ratio=ratio)
    return made


def as_method(label: str, press: Any) -> Method:
    def attach(model: Any, prompt: Prompt) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = press(model)
        return context

    return Method(label, attach)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="cpu-308m", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # "not tested" for every LLaVA run
    methods = [untouched(), *(as_method(label, press) for label, press in presses().items())]
    try:
        device, dtype = device_of(given.device), dtype_of(given.dtype)
        subject = from_shape(given.shape, device, dtype)
        results = []
        for batch in given.batch:
            workload = Workload(
                batch=batch,
                visual=subject.visual_tokens,
                text=max(32, subject.text_tokens),
                images=subject.images,
                new_tokens=given.new_tokens,
                repeats=given.repeats,
            )
            print(workload.title, file=sys.stderr)
            results.append(run(subject, workload, methods))
    except ValueError as error:
        sys.exit(f"error: {error}")
    where = conditions(device, dtype)
    print(as_markdown(results, where, "kvpress"))
    save(results, where, given.out, f"kvpress-{given.shape}-{device.type}", plots=False)


if __name__ == "__main__":
    main()
