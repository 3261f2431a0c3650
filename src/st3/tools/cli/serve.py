"""`st3 serve`: an OpenAI-compatible server for a trimmed model."""

from __future__ import annotations

import functools
import logging
import re
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from st3.methods import DEFAULT_POLICY
from st3.tools.cli._common import BUNDLED_MODEL, CliError, read_policy, stderr, warn
from st3.tools.cli._options import (
    POLICY,
    Attention,
    Budget,
    Device,
    DType,
    MaxNewTokens,
    Model,
    Precision,
    Revision,
    Threads,
    TrustRemoteCode,
)
from st3.tools.common.errors import first_line

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def serve(
    model: Model = None,
    revision: Revision = None,
    policy: Annotated[
        str, typer.Option(metavar=POLICY, help="Of requests that name none; see `st3 policies`.")
    ] = DEFAULT_POLICY,
    budget: Budget = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What clients call the model. Default: as --model."),
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For KV entries, e.g. 8G. Default: half of what's free."),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; then 429.")] = 64,
    max_running: Annotated[
        int, typer.Option(min=1, help="Requests that may run at once, whatever the budget.")
    ] = 256,
    max_prefills: Annotated[
        int, typer.Option(min=1, help="Prompts taken in between two decode steps.")
    ] = 4,
    max_new_tokens: MaxNewTokens = 4096,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the model's positions.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Images in a request.")] = 16,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Pixels of an image; more are refused undecoded.")
    ] = 16_000_000,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of a request.")] = "20M",
    prepare_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For decoding images, of all requests together. Default: 256M, or what an image "
            "of --max-pixels needs.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for an answer, the queue included.")
    ] = 300.0,
    grace: Annotated[
        float, typer.Option(min=0.1, help="Seconds for running answers when told to stop.")
    ] = 30.0,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask clients for the key in this file.")
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Allow file: URLs inside this folder.")
    ] = None,
    allow_http_images: Annotated[
        bool, typer.Option("--allow-http-images", help="Fetch images of public http(s): URLs.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages of this origin may ask, `*`: all. Repeat."),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page for people at /.")] = True,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line for each request.")
    ] = True,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Serve on Ray; `local` starts one here.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Models on Ray, at least.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Models on Ray, at most; between them it scales.")
    ] = None,
    gpus_per_replica: Annotated[float, typer.Option(min=0, help="GPUs of a model on Ray.")] = 0,
    attention: Attention = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer OpenAI chat completions with a trimmed model, many at once.

    [bold]Examples[/bold]

    st3 serve

    st3 serve -m ./llava-1.5-7b-hf --policy st3-7b --kv-budget 24G --host 0.0.0.0 --api-key-file key

    st3 serve -m ./llava-1.5-7b-hf --ray auto --replicas 2 --max-replicas 8 --gpus-per-replica 1
    """
    check_installed()
    kv_bytes = None if kv_budget is None else _size("--kv-budget", kv_budget)
    console = stderr()
    with console.status("importing torch and transformers"):
        from st3.tools.cli import _loading
        from st3.tools.serve import Engine, Settings, create_app
        from st3.tools.serve.run import serve as run
    chosen = read_policy(policy, budget)
    load = functools.partial(
        _loading.load,
        model,
        device,
        dtype.value,
        trust_remote_code,
        attention=attention,
        threads=threads,
        revision=revision,
    )
    try:
        settings = Settings(
            model_name=name or model or BUNDLED_MODEL,
            api_key=None if api_key_file is None else _key(api_key_file),
            allowed_hosts=("127.0.0.1", "localhost", "[::1]") if host in _LOOPBACK else (),
            image_folder=image_folder,
            http_images=allow_http_images,
            cors_origins=tuple(cors_origin or ()),
            prepare_bytes=(
                None if prepare_memory is None else _size("--prepare-memory", prepare_memory)
            ),
            max_body_bytes=_size("--max-body", max_body),
            max_images=max_images,
            max_pixels=max_pixels,
            max_tokens=max_new_tokens,
            request_timeout=timeout,
            shutdown_timeout=grace,
            page=page,
        )
    except (ValueError, TypeError) as error:
        raise CliError(first_line(error), 2) from error
    if host not in _LOOPBACK and settings.api_key is None:
        warn(f"anyone who reaches {host} may ask: consider --api-key-file")
    limits: dict[str, Any] = {
        "policy": chosen,
        "kv_budget_bytes": kv_bytes,
        "queue_limit": queue,
        "max_rows": max_running,
        "max_prefills_per_step": max_prefills,
        "max_prompt_tokens": max_prompt_tokens,
    }
    if ray is not None:
        _run_on_ray(
            ray, load, settings, limits, replicas, max_replicas, gpus_per_replica, host, port
        )
        return
    if replicas > 1 or max_replicas is not None or gpus_per_replica:
        raise CliError("--replicas, --max-replicas and --gpus-per-replica need --ray", 2)
    with console.status(f"loading {settings.model_name}"):
        loaded = load()
    try:
        listener = listen(host, port)
        engine = Engine(loaded.model, loaded.processor, **limits)
    except (ValueError, TypeError) as error:
        raise CliError(first_line(error), 2) from error
    url = address(listener)
    console.print(
        f"{settings.model_name} ({loaded.conditions()}), policy {engine.policy}, KV budget "
        f"{engine.budget.total / (1 << 30):.2f} GiB: {url}/v1",
        soft_wrap=True,
    )
    if page:
        console.print(f"a page to ask on: {url}/    (Ctrl-C stops)", soft_wrap=True)
    _log(access_log)
    run(create_app(engine, settings), engine, listener, grace)


def check_installed() -> None:
    """Raises CliError without the extra ``server``."""
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise CliError(
            f"st3 serve needs packages that are not installed ({error.name}): "
            "pip install 'st3[server]'"
        ) from error


def _log(requests: bool) -> None:
    """Warnings and, if asked for, a line for each request, on stderr."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("st3.access").setLevel(logging.INFO if requests else logging.WARNING)


def _run_on_ray(
    address: str, load: Any, settings: Any, limits: dict[str, Any], replicas: int,
    max_replicas: int | None, gpus: float, host: str, port: int,
) -> None:  # fmt: skip
    if port == 0:
        raise CliError("--port 0 is not for --ray: name a port", 2)
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise CliError(f"--ray needs Ray ({error.name}): pip install 'st3[server,ray]'") from error
    from st3.tools.serve.ray import application, start, wait_and_stop

    console = stderr()
    try:
        app = application(
            load, settings, limits, replicas=replicas, max_replicas=max_replicas, gpus=gpus
        )
        with console.status("starting replicas on Ray"):
            start(app, address, host, port)
    except (ValueError, TypeError) as error:
        raise CliError(first_line(error), 2) from error
    except (RuntimeError, ConnectionError, OSError) as error:
        raise CliError(f"Ray: {first_line(error)}") from error
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    console.print(f"{settings.model_name} on Ray, policy {limits['policy']}: {url}/v1")
    wait_and_stop()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises CliError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise CliError(f"cannot listen on {host} port {port}: {first_line(error)}") from error


def address(listener: socket.socket) -> str:
    """``http://host:port``."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _size(option: str, text: str) -> int:
    """Bytes: ``1500000``, ``512M``, ``8GiB``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise CliError(f"{option} {text}: give bytes, such as 512M or 8G", 2)
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise CliError(f"--api-key-file {path}: {first_line(error)}", 2) from error
    if not key or not key.isascii() or any(c.isspace() for c in key):
        raise CliError(f"--api-key-file {path}: the key is one word of ASCII characters", 2)
    return key
