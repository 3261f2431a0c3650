"""A batch run over Ray Data: one actor for each GPU, or share of the CPUs, each with a model.

What travels to an actor is a window of refs, not rows: actors read the rows and the images
themselves, from a path that all machines see. What comes back are answers, which the driver alone
writes. If an actor dies, Ray starts another one and gives it the unfinished windows again; the
driver drops answers that it has.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import Any

import torch

from st3.tools.batch.inputs import Ref, open_source
from st3.tools.batch.run import BatchError, Execute, Load, Options
from st3.tools.batch.worker import Done

MOST_BLOCKS = 10_000


class Actor:
    """Loads a model, and answers one window a call. threads: of torch, on CPUs."""

    def __init__(self, options: Options, load: Load, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.source = open_source(options.input, options.prompt)
        self.worker = options.worker(load())

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        for text in block["window"]:
            refs = [Ref(*ref) for ref in json.loads(text)]
            for done in self.worker.window(self.source.read(refs), self.source.base):
                yield {"done": [json.dumps(dataclasses.asdict(done))]}


def on_ray(address: str, actors: int | None = None, gpus_per_actor: int | None = None) -> Execute:
    """How :func:`st3.tools.batch.run` answers on Ray.

    Args:
        address: of a running cluster, as ray.init() takes it; "local" starts one here.
        actors: None: one for each ``gpus_per_actor`` GPUs of the cluster; 1 without GPUs.
        gpus_per_actor: None: 1 where the cluster has GPUs, else 0.

    Raises:
        BatchError: if Ray is not installed, cannot be reached, or has too few GPUs or CPUs.
        RuntimeError: if an actor fails, other than on a row; from the run.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BatchError("Ray is not installed: pip install 'st3[ray]', or leave out --ray") from (
            error
        )

    def execute(options: Options, load: Load, windows: list[list[Ref]]) -> Iterator[Done]:
        started = _connect(ray, address)
        try:
            count, gpus, cpus = _shares(ray.cluster_resources(), actors, gpus_per_actor)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False  # the caller shows one of its own
            items = [{"window": json.dumps(window)} for window in windows]
            dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
            results = dataset.map_batches(
                Actor,
                fn_constructor_args=(options, load, None if gpus else max(1, int(cpus))),
                batch_size=1,
                batch_format="numpy",
                concurrency=min(count, len(items)),
                num_gpus=gpus,
                num_cpus=cpus,
            )
            for row in results.iter_rows():
                yield Done(**json.loads(row["done"]))
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray gave up: {_reason(error)}") from error
        finally:
            if started:
                ray.shutdown()

    return execute


def _connect(ray: Any, address: str) -> bool:
    """Whether a connection was made here, to be closed again."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise BatchError(f"no Ray cluster at {address!r}: {_reason(error)}") from error
    return True


def _shares(
    resources: dict[str, float], actors: int | None, gpus: int | None
) -> tuple[int, int, float]:
    """Actors, and the GPUs and CPUs of each."""
    all_gpus, all_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    gpus = min(1, all_gpus) if gpus is None else gpus
    if gpus > all_gpus:
        raise BatchError(f"an actor shall have {gpus} GPUs; the cluster has {all_gpus}")
    count = actors if actors is not None else all_gpus // gpus if gpus else 1
    if count * gpus > all_gpus:
        raise BatchError(
            f"{count} actors with {gpus} GPUs each need {count * gpus}; the cluster has {all_gpus}"
        )
    if count > all_cpus:
        raise BatchError(f"{count} actors need a CPU each; the cluster has {all_cpus}")
    # With GPUs the model hardly needs CPUs; without, an actor has its share of them all.
    return count, gpus, 1.0 if gpus else float(all_cpus // count)


def _reason(error: BaseException) -> str:
    """The last line of Ray's message: it is the message of what was raised in the actor."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
