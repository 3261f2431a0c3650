"""`st3 demo`: the server's page on the bundled model, in the browser."""

from __future__ import annotations

import logging
import webbrowser
from typing import Annotated

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import CliError, read_policy, stderr
from st3.tools.cli._options import (
    Attention,
    Budget,
    Device,
    DType,
    Model,
    PolicyName,
    Precision,
    Revision,
    Threads,
    TrustRemoteCode,
)
from st3.tools.cli.serve import address, check_installed, listen
from st3.tools.common.errors import first_line


def demo(
    model: Model = None,
    revision: Revision = None,
    policy: PolicyName = DEFAULT_POLICY,
    budget: Budget = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    attention: Attention = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Open a page to ask about a picture, untrimmed and trimmed side by side. Ctrl-C ends it.

    The page is that of `st3 serve`, reached from this machine alone; nothing is fetched.

    [bold]Examples[/bold]

    st3 demo

    st3 demo -m ./llava-1.5-7b-hf --policy st3-7b
    """
    check_installed()
    console = stderr()
    with console.status("importing torch and transformers"):
        from st3.tools.cli import _loading
        from st3.tools.serve import Engine, Settings, create_app
        from st3.tools.serve.run import serve
    chosen = read_policy(policy, budget)
    with console.status(f"loading {model or 'the bundled model'}"):
        loaded = _loading.load(
            model, device, dtype.value, trust_remote_code,
            attention=attention, threads=threads, revision=revision,
        )  # fmt: skip
    listener = listen("127.0.0.1", port)
    try:
        engine = Engine(loaded.model, loaded.processor, chosen)
    except (ValueError, TypeError) as error:
        raise CliError(first_line(error), 2) from error
    settings = Settings(loaded.name, allowed_hosts=("127.0.0.1", "localhost", "[::1]"))
    url = f"{address(listener)}/"

    def ready() -> None:
        opened = browser and webbrowser.open(url)
        how = "opened in the browser" if opened else "open it in a browser"
        console.print(f"{loaded.name} on {url}: {how}; Ctrl-C stops", soft_wrap=True)

    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("st3.access").setLevel(logging.WARNING)
    serve(create_app(engine, settings), engine, listener, 3, ready)
