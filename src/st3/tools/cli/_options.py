"""Options that several commands take, declared once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class DType(StrEnum):
    """Precisions that a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="PATH_OR_ID", help="Default: the bundled st3-tiny."),
]
PolicyName = Annotated[
    str,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]|FILE.json",
        help="How to trim; see `st3 policies`. A file is one of `st3 tune`.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SHARE",
        help="Mean share of visual tokens over the layers: 35% or 0.35.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
DeviceMap = Annotated[
    str | None, typer.Option(metavar="auto|balanced|...", help="Spread the layers (accelerate).")
]
Precision = Annotated[
    DType,
    typer.Option(metavar="DTYPE", help="auto (as it was saved), float32, bfloat16 or float16."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="KERNEL", help="sdpa, eager, flash_attention_2 ... Default: transformers' choice."
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of the model. Default: torch's choice.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's folder run its own code.")
]
