"""Options that several commands take, declared once: the same thing has the same name everywhere.

An option that takes one thing is singular (``--policy``), and so is one that may be repeated
(``--image``); one that takes a list with commas is plural (``--policies``).
"""

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


SHORT_DTYPES = {"fp32": DType.float32, "bf16": DType.bfloat16, "fp16": DType.float16}


def read_dtype(text: str) -> DType:
    """What --dtype says. Raises typer.BadParameter with the choices."""
    try:
        return SHORT_DTYPES.get(text) or DType(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(DType)}") from None


OLD_NAMES: dict[str, dict[str, str]] = {
    "analyze": {"--images": "--image", "--prompts": "--prompt"},
    "batch": {"--actors": "--replicas", "--gpus-per-actor": "--gpus-per-replica"},
    "bench": {
        "--images": "--image-count",
        "--new-tokens": "--max-new-tokens",
        "--policy": "--policies",
        "--repeats": "--rounds",
    },
    "cost": {
        "--images": "--image-count",
        "--new-tokens": "--max-new-tokens",
        "--policy": "--policies",
    },
    "eval": {"--budget": "--budgets", "--policy": "--policies"},
    "generate": {"--runs": "--rounds"},
    "serve": {"--max-tokens": "--max-new-tokens"},
    "tune": {"--budget": "--budgets", "--policy": "--policies"},
}
"""For each command the names that it also takes and does not show, such as those of old."""

POLICY = "NAME[:KEY=VALUE,...]|FILE.json"

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="PATH_OR_ID", help="Default: the bundled st3-tiny."),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REV", help="Branch, tag or commit of a hub id. Default: main."
    ),
]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="System prompt: comes before the user's turn."),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy", metavar=POLICY, help="How to trim; see `st3 policies`. A file: of `st3 tune`."
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policies", metavar="P,P,...", help="How to trim; see `st3 policies`."),
]
PoliciesOrAll = Annotated[
    list[str] | None,
    typer.Option(
        "--policies",
        metavar="P,P,...",
        help="How to trim; see `st3 policies`. `all`: every method of st3.",
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
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="Rows answered together.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps ...")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map", metavar="auto|balanced|...", help="Spread the layers (accelerate)."
    ),
]
Precision = Annotated[
    DType,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        parser=read_dtype,
        help="auto (as it was saved), float32, bfloat16 or float16.",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="KERNEL",
        help="sdpa, eager, flash_attention_2 ... Default: transformers' choice.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads of the model. Default: torch's choice."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's folder run its own code.")
]
