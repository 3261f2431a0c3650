"""`st3 cost`: FLOPs and KV memory of policies on a model, computed from its config."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import (
    CliError,
    listed,
    print_json,
    read_policy,
    shown,
    stderr,
    stdout,
)
from st3.tools.cli._options import AsJson, Budget, Policies, Revision, TrustRemoteCode
from st3.tools.common.errors import LoadError, first_line

if TYPE_CHECKING:
    from st3.cost import CostRow

DEFAULT_SHAPE = "llava-1.5-7b"
MOST_PIXELS = 64_000_000
DEFAULT_POLICIES = [DEFAULT_POLICY, "st3", "fastv:layer=2", "fastv:layer=3", "vtw"]


def cost(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="SHAPE|FOLDER|ID", help="A named shape, or any model's config."
        ),
    ] = DEFAULT_SHAPE,
    revision: Revision = None,
    policies: Policies = None,
    budget: Budget = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", "-i", metavar="FILE",
            help="Count the visual tokens of this image; may be repeated. Needs a processor: a "
            "model's folder or hub id.",
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="WxH", help="The same for an image of this size in pixels."),
    ] = None,
    visual: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens. Default: the shape's.")
    ] = None,
    text: Annotated[int, typer.Option(min=0, help="Text tokens of the prompt.")] = 64,
    image_count: Annotated[
        int | None, typer.Option(min=1, help="Images that the visual tokens come from.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length of the answer, over which KV memory is averaged.")
    ] = 128,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the KV cache: float32, bfloat16, float16.")
    ] = "bfloat16",
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Compute what policies save: prefill FLOPs, visual tokens, KV memory. Nothing is measured and
    no model is built. Without --policies: the default, st3, FastV at two layers, VTW.

    [bold]Examples[/bold]

    st3 cost

    st3 cost -m llava-next-7b --policies st3-7b,fastv:layer=2,drop=0.75

    st3 cost -m Qwen/Qwen2.5-VL-7B-Instruct --image photo.jpg

    st3 cost -m ./my-model --size 1344x896 --size 640x480 --max-new-tokens 300 --json
    """
    given_by = [name for name, value in (
        ("--image", image), ("--size", size), ("--visual", visual)) if value]  # fmt: skip
    if len(given_by) > 1:
        raise CliError(f"{' and '.join(given_by)} exclude each other: give one of them", 2)
    sizes = [_size(one) for one in size or ()]
    with stderr().status("importing transformers"):
        from st3.cost import TextDims, cost_table
        from st3.cost.shapes import SHAPES, load_config
        from st3.engine.plan import lay_out
        from st3.engine.wiring import Wiring
        from st3.methods.policies import check_model, with_budget
        from st3.models import model_facts
    shape = SHAPES.get(model)
    names = listed(policies, DEFAULT_POLICIES)
    chosen = [read_policy(name, budget, "--policies") for name in names]
    source = _source(model)
    hub = _hub(source, model, revision)
    if hub or trust_remote_code:
        hub["trust_remote_code"] = trust_remote_code
    try:
        config = load_config(source, **hub)
        counted = _counted(model, config, shape, image, sizes, revision, trust_remote_code)
        tokens = counted or visual or (shape.visual_tokens if shape else 0)
        if not tokens:
            raise ValueError(
                "how many visual tokens? Say --image, --size or --visual; only named shapes know: "
                f"{', '.join(SHAPES)}"
            )
        dims = TextDims.from_config(config)
        wiring = Wiring(dims.sources, dims.in_order)
        for one in chosen:
            check_model(one, model_facts(config))
        laid = {str(one): lay_out(with_budget(one, dims.num_layers), wiring) for one in chosen}
        rows = cost_table(
            config,
            text,
            tokens,
            laid,
            max_new_tokens,
            dtype,
            image_count or len(image or sizes) or (shape.images if shape and visual is None else 1),
        )
    except ValueError as error:
        raise CliError(first_line(error), 2) from error
    given = {
        "model": model if revision is None else f"{model}@{revision}",
        "visual": tokens,
        "text": text,
        "new_tokens": max_new_tokens,
        "dtype": dtype,
    }
    if as_json:
        print_json({**given, "rows": [dataclasses.asdict(row) for row in rows]})
    else:
        # A preset by its name: what it stands for does not fit into a column.
        called = {str(one): shown(name, one) for name, one in zip(names, chosen, strict=True)}
        _show(given, rows, called)
        if at_most := [called[name] for name, schedule in laid.items() if schedule.counted]:
            stdout().print(
                f"{', '.join(at_most)}: at most; how many tokens stay is the image's own number.",
                style="dim",
            )


def _source(model: str) -> str:
    """A shape, a folder or a hub id; for the bundled model's name its folder."""
    from st3.tools.common.bundled import BUNDLED_MODEL, bundled_model

    if model != BUNDLED_MODEL or Path(model).exists():
        return model
    try:
        return str(bundled_model())
    except FileNotFoundError as error:
        raise CliError(f"{error} with --model") from error


def _hub(source: str, model: str, revision: str | None) -> dict[str, Any]:
    """What from_pretrained is told of a hub id. Raises CliError where the hub cannot be reached and
    the model is not in the cache, and for a revision of a shape or folder."""
    if "/" not in source and not Path(source).exists():
        if revision is not None:
            raise CliError(f"--revision is for a hub id: {model!r} is none", 2)
        return {}
    from st3.tools.common.load import hub_options

    try:
        return hub_options(source, model if revision is None else f"{model}@{revision}", revision)
    except LoadError as error:
        raise CliError(str(error), 2 if error.usage else 1) from error


def _size(text: str) -> tuple[int, int]:
    """Width and height in pixels: ``1344x896``."""
    found = re.fullmatch(r"\s*([1-9]\d*)\s*[x*\u00d7]\s*([1-9]\d*)\s*", text, re.IGNORECASE)
    if found is None:
        raise CliError(f"--size {text}: give width and height in pixels, such as 1344x896", 2)
    width, height = int(found[1]), int(found[2])
    if width * height > MOST_PIXELS:
        raise CliError(f"--size {text}: that is more than {MOST_PIXELS // 10**6} megapixels", 2)
    return width, height


def _counted(
    model: str,
    config: Any,
    shape: Any,
    files: list[str] | None,
    sizes: list[tuple[int, int]],
    revision: str | None,
    trust_remote_code: bool,
) -> int:
    """The visual tokens of the images that were named; 0 where none was."""
    if not files and not sizes:
        return 0
    if shape is not None:
        raise CliError(
            f"--image and --size need the model's processor, which the shape {model} does not "
            "have: give its folder or hub id, or --visual",
            2,
        )
    from PIL import Image

    from st3.tools.cli._loading import load_images
    from st3.tools.common.load import load_processor
    from st3.tools.common.visual import visual_tokens

    images = load_images(files or ()) or [Image.new("RGB", one) for one in sizes]
    try:
        processor = load_processor(model, trust_remote_code, revision)
    except LoadError as error:
        raise CliError(str(error), 2 if error.usage else 1) from error
    return visual_tokens(config, processor, images)


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
        "\nComputed from the config, not measured; percentages are of the untrimmed model. TFLOPs: "
        "prefill of the text decoder; the vision tower, the same in every row, comes to it: "
        f"{'not known' if tower is None else f'{tower:.3g}'}. visual: tokens that a layer sees, "
        f"mean over the layers. KV: live MiB in {given['dtype']}, first after the prefill, mean "
        f"over {given['new_tokens']} new tokens.",
        style="dim",
    )
