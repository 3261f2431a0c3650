"""Load a model and images for a command: what goes wrong becomes its one line of error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from st3.tools.cli._common import CliError
from st3.tools.common import load as loading
from st3.tools.common.chats import ask, encode
from st3.tools.common.errors import ImageError, LoadError
from st3.tools.common.images import open_image
from st3.tools.common.load import Loaded as Loaded
from st3.tools.common.load import quiet as quiet

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load(
    name: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    device_map: str | None = None,
    tensor_parallel: int | None = None,
    attention: str | None = None,
    threads: int | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load a folder or hub id (None: the bundled model). Raises CliError with the remedy.

    Args:
        device_map: how accelerate spreads the layers over devices, in place of ``device``.
        tensor_parallel: processes that share each layer, in place of ``device``.
        attention: transformers' attention kernel; None: its choice.
        threads: of the CPU, from now on in this process; None: torch's choice.
        revision: branch, tag or commit of a hub id.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = _where(device, device_map, tensor_parallel)
    try:
        return loading.load(
            name, device, dtype, trust_remote_code, attention, revision=revision, **where
        )
    except LoadError as error:
        raise CliError(str(error), 2 if error.usage else 1) from error


def load_images(paths: Sequence[str]) -> list[Image.Image]:
    """Open images for a model; ``-`` is stdin. Raises CliError that names the file."""
    try:
        return [
            open_image(sys.stdin.buffer.read(), name="the image on stdin")
            if path == "-"
            else open_image(path)
            for path in paths
        ]
    except ImageError as error:
        raise CliError(str(error), 2) from error


def prepare(
    loaded: Loaded, images: Sequence[Image.Image], prompt: str, system: str | None = None
) -> Any:
    """The inputs of generate() for one user turn: all images, then the prompt. A system prompt
    comes before it."""
    return encode(loaded.model, loaded.processor, [ask(images, prompt, system)])


def _where(device: str, device_map: str | None, tensor_parallel: int | None) -> dict[str, Any]:
    """What from_pretrained is told about a model on several devices; nothing for one device."""
    if device_map is None and tensor_parallel is None:
        return {}
    if device != "auto" or (device_map is not None and tensor_parallel is not None):
        raise CliError("--device, --device-map and --tp exclude each other", 2)
    if device_map is not None:
        if device_map not in DEVICE_MAPS:
            raise CliError(f"--device-map {device_map}: choose {', '.join(DEVICE_MAPS)}", 2)
        return {"device_map": device_map}
    if int(os.environ.get("WORLD_SIZE", "1")) != tensor_parallel:
        raise CliError(
            f"--tp {tensor_parallel} takes {tensor_parallel} processes: start it with torchrun "
            f"--nproc-per-node {tensor_parallel} -m st3.tools.cli ...",
            2,
        )
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=tensor_parallel)}
