"""`st3 cost`: FLOPs and KV memory of policies on a model, computed from its config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import CliError, print_json, read_policy, shown, stderr, stdout
from st3.tools.cli._options import AsJson, Budget
from st3.tools.common.errors import LoadError, first_line

if TYPE_CHECKING:
    from st3.cost import CostRow

DEFAULT_SHAPE = "llava-1.5-7b"
DEFAULT_POLICIES = [DEFAULT_POLICY, "st3", "fastv:layer=2", "fastv:layer=3", "vtw"]


def cost(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="SHAPE|FOLDER|ID", help="A named shape, or any model's config."
        ),
    ] = DEFAULT_SHAPE,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]|FILE.json",
            help=f"A policy; may be given again. Default: {', '.join(DEFAULT_POLICIES)}.",
        ),
    ] = None,
    budget: Budget = None,
    visual: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens. Default: the shape's.")
    ] = None,
    text: Annotated[int, typer.Option(min=0, help="Text tokens of the prompt.")] = 64,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images that the visual tokens come from.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Generated tokens over which the KV cache is averaged.")
    ] = 128,
    dtype: Annotated[str, typer.Option(help="Of the KV cache.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Compute what policies save: prefill FLOPs, visual tokens, KV memory. Nothing is measured and
    no model is built.

    [bold]Examples[/bold]

    st3 cost

    st3 cost --model llava-next-7b --policy st3-7b --policy fastv:layer=2,drop=0.75

    st3 cost --model ./my-model --visual 1024 --new-tokens 300 --json
    """
    with stderr().status("importing transformers"):
        from st3.cost import TextDims, cost_table
        from st3.cost.shapes import SHAPES, load_config
        from st3.engine.plan import lay_out
        from st3.engine.wiring import Wiring
        from st3.methods.policies import check_model, with_budget
        from st3.models import model_facts
    shape = SHAPES.get(model)
    names = policy or DEFAULT_POLICIES
    chosen = [read_policy(name, budget) for name in names]
    _check_hub(model)
    try:
        config = load_config(model)
        if visual is None and shape is None:
            known = ", ".join(SHAPES)
            raise ValueError(f"--visual says how many visual tokens; only shapes know it: {known}")
        dims = TextDims.from_config(config)
        wiring = Wiring(dims.sources, dims.in_order)
        for one in chosen:
            check_model(one, model_facts(config))
        rows = cost_table(
            config,
            text,
            visual or (shape.visual_tokens if shape else 0),
            {str(one): lay_out(with_budget(one, dims.num_layers), wiring) for one in chosen},
            new_tokens,
            dtype,
            images or (shape.images if shape and visual is None else 1),
        )
    except ValueError as error:
        raise CliError(first_line(error), 2) from error
    given = {
        "model": model,
        "visual": visual or (shape.visual_tokens if shape else 0),
        "text": text,
        "new_tokens": new_tokens,
        "dtype": dtype,
    }
    if as_json:
        print_json({**given, "rows": [dataclasses.asdict(row) for row in rows]})
    else:
        # A preset by its name: what it stands for does not fit into a column.
        called = {str(one): shown(name, one) for name, one in zip(names, chosen, strict=True)}
        _show(given, rows, called)


def _check_hub(model: str) -> None:
    """Raises CliError for a hub id where the hub cannot be reached."""
    if "/" not in model or Path(model).exists():
        return
    from st3.tools.common.load import hub_options

    try:
        hub_options(model, model)
    except LoadError as error:
        raise CliError(str(error)) from error


def _show(given: dict[str, Any], rows: list[CostRow], called: dict[str, str]) -> None:
    from st3.tools.common import tables

    head = ("policy", "TFLOPs", "%", "visual", "%", "KV first", "%", "KV mean", "%")
    lines = [list(row.cells()) for row in rows]
    for line in lines:
        line[0] = called.get(line[0], line[0])
    table = tables.console(head, lines, fold=(0,))
    console = stdout()
    console.print(f"{given['model']}: {given['visual']} visual and {given['text']} text tokens\n")
    console.print(table)
    tower = rows[0].vision_tflops
    console.print(
        "\nComputed from the config, not measured; per cents are of the untrimmed model. TFLOPs: "
        "prefill of the text decoder; the vision tower, the same in every row, comes to it: "
        f"{'not known' if tower is None else f'{tower:.3g}'}. visual: tokens that a layer sees, "
        f"mean over the layers. KV: live MiB in {given['dtype']}, first after the prefill, mean "
        f"over {given['new_tokens']} new tokens.",
        style="dim",
    )
