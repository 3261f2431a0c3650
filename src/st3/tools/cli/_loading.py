"""Load a model, its processor and images, and turn what goes wrong into one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor

from st3.tools.cli._common import BUNDLED_MODEL, CliError, assets
from st3.tools.common.chats import ask, encode
from st3.tools.common.reasons import first_line

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer. name: as the user gave it."""

    name: str
    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def conditions(self) -> str:
        """Where and in what precision the model runs, for printing beside a measurement."""
        device = self.model.device.type
        threads = torch.get_num_threads()
        cpu = f"{threads} CPU thread{'s' if threads > 1 else ''}"
        where = (
            cpu if device == "cpu" else torch.cuda.get_device_name() if device == "cuda" else device
        )
        return f"{where}, {str(self.model.dtype).removeprefix('torch.')}"


def load(
    name: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    device_map: str | None = None,
    tensor_parallel: int | None = None,
) -> Loaded:
    """Load a folder or hub id (None: the bundled model). Raises CliError with the remedy.

    Args:
        device_map: how accelerate spreads the layers over devices, in place of ``device``.
        tensor_parallel: processes that share each layer, in place of ``device``.
    """
    source = str(_bundled() if name is None else _folder_or_id(name))
    shown = BUNDLED_MODEL if name is None else name
    where = _where(device, device_map, tensor_parallel)
    target = _device(device) if not where else None
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=weights, trust_remote_code=trust_remote_code, **where
            )
    except Exception as error:  # from_pretrained raises a dozen unrelated types
        raise CliError(_explain(shown, source, error)) from error
    if not hasattr(processor, "image_processor"):
        raise CliError(f"cannot use model {shown!r}: its processor takes no images")
    return Loaded(shown, (model if target is None else model.to(target)).eval(), processor)


def load_images(paths: Sequence[str]) -> list[Image.Image]:
    """Open images as RGB, turned as their EXIF data says. Raises CliError that names the file."""
    return [_open(path) for path in paths]


def prepare(loaded: Loaded, images: Sequence[Image.Image], prompt: str) -> Any:
    """The inputs of generate() for one user turn: all images, then the prompt."""
    return encode(loaded.model, loaded.processor, [ask(images, prompt)])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes off stderr; errors still show."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _bundled() -> Path:
    folder = assets() / BUNDLED_MODEL
    if not (folder / "config.json").is_file():
        raise CliError(
            "the bundled model is not part of this installation: name a model with --model"
        )
    return folder


def _folder_or_id(name: str) -> Path | str:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CliError(f"folder {name!r} holds no model: it has no config.json")
        return path
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if not name.strip() or looks_like_path:
        raise CliError(f"no such model folder: {name!r}")
    return name


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


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when built without the device
        raise CliError(f"device {name!r} cannot be used here: {first_line(error)}", 2) from error
    return device


def _explain(shown: str, source: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"model {shown!r} runs code of its own: pass --trust-remote-code if you trust it"
    if isinstance(error, ImportError):
        return f"model {shown!r} needs a package that is not installed: {first_line(error)}"
    if not Path(source).is_dir() and isinstance(error, OSError):
        return (
            f"cannot load model {shown!r}: it is no folder here, and it is neither in the local "
            "cache nor could it be had from the model hub (offline, misspelt, or access refused?). "
            "Give a local folder, or check the name and the connection"
        )
    if "Unrecognized configuration class" in text or "Unrecognized model" in text:
        return (
            f"model {shown!r} is not an image-text-to-text model that this version of "
            f"transformers ({transformers.__version__}) knows"
        )
    return f"cannot load model {shown!r}: {type(error).__name__}: {first_line(error)}"


def _open(path: str) -> Image.Image:
    if path.startswith(("http://", "https://")):
        raise CliError(f"{path!r} is an address: download the image and give the file", 2)
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise CliError(f"no such image: {path!r}", 2) from error
    except IsADirectoryError as error:
        raise CliError(f"{path!r} is a folder, not an image", 2) from error
    except UnidentifiedImageError as error:
        raise CliError(f"{path!r} is not an image that Pillow can read", 2) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CliError(f"image {path!r} cannot be read: {first_line(error)}", 2) from error
