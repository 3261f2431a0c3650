"""The server on Ray Serve: replicas of the same app, each an engine with a model of its own."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from st3.tools.serve.app import create_app
from st3.tools.serve.engine import Engine
from st3.tools.serve.settings import Settings

NAME = "st3"


def application(
    load: Callable[[], Any],
    settings: Settings,
    engine: dict[str, Any] | None = None,
    *,
    replicas: int = 1,
    max_replicas: int | None = None,
    gpus: float = 0,
    cpus: float = 1,
) -> Any:
    """A Ray Serve application, for ``serve.run()`` or a ``serve`` config file.

    Args:
        load: gives an object with ``model`` and ``processor``; called in each replica.
        engine: keyword arguments of :class:`~st3.tools.serve.Engine`. Each replica has a KV budget
            and a queue of its own; name ``kv_budget_bytes`` where several replicas share a device.
        replicas: at the start, and at least.
        max_replicas: if more, replicas come and go with the requests that run and wait.
        gpus, cpus: that Ray sets aside for each replica.

    Raises:
        ValueError: fewer ``max_replicas`` than ``replicas``.
    """
    from ray import serve

    if max_replicas is not None and max_replicas < replicas:
        raise ValueError(f"max_replicas {max_replicas} is less than replicas {replicas}")
    options = engine or {}

    def build() -> FastAPI:  # runs in the replica
        loaded = load()
        return create_app(Engine(loaded.model, loaded.processor, **options), settings)

    # The engine's own queue refuses what is too much, with Retry-After: let requests get there.
    rows, queue = options.get("max_rows", 256), options.get("queue_limit", 64)
    scale: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "initial_replicas": replicas,
                "max_replicas": max_replicas,
                # Another replica comes before the queue of those there is full.
                "target_ongoing_requests": max(1, queue // 2),
            }
        }
    deployment = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        max_ongoing_requests=2 * (rows + queue),
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        **scale,
    )
    return deployment.bind()


def start(app: Any, address: str, host: str, port: int) -> None:
    """Connect to a Ray cluster ("local" starts one), and serve there. Returns when it answers.

    Raises:
        ConnectionError: no such cluster.
        RuntimeError: the replicas do not come up; their logs say why.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    serve.start(http_options={"host": host, "port": port})
    serve.run(app, name=NAME, route_prefix="/")


def wait_and_stop() -> None:
    """Wait for SIGINT or SIGTERM, then let running answers finish and stop."""
    from ray import serve

    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    while not told.wait(0.5):
        pass
    serve.delete(NAME)
    serve.shutdown()
