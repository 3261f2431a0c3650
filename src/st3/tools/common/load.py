"""Load a model with its processor: one way for all tools."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForImageTextToText, AutoProcessor

from st3.tools.common.bundled import BUNDLED_MODEL, bundled_model
from st3.tools.common.errors import LoadError, first_line

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer. name: as the user gave it, ``id@revision`` with one."""

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
    name: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    attention: str | None = None,
    revision: str | None = None,
    **where: Any,
) -> Loaded:
    """A model in eval mode and its processor.

    Args:
        name: a folder or hub id; None or ``"st3-tiny"``: the bundled model.
        device: as for :func:`device_of`.
        dtype: ``"auto"`` (the checkpoint's), or as for :func:`dtype_of`.
        attention: transformers' attention kernel; None: its choice.
        revision: branch, tag or commit of a hub id; None: its main branch.
        where: arguments of from_pretrained that spread the model over devices, in place of
            ``device``: device_map, distributed_config.

    Raises:
        LoadError: no such model, one that is no image-text-to-text model, a checkpoint that lacks
            weights of the model, a device that cannot be used here, a revision of a folder.
    """
    source, shown = _source(name, revision)
    hub = hub_options(source, shown, revision)
    processor = _processor(source, shown, hub, trust_remote_code)
    model = _model(source, shown, hub, device, dtype, trust_remote_code, attention, where)
    return Loaded(shown, model, processor)


def load_processor(name: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The processor of :func:`load` alone, for what needs no model."""
    source, shown = _source(name, revision)
    return _processor(source, shown, hub_options(source, shown, revision), trust_remote_code)


def _processor(source: str, shown: str, hub: dict[str, Any], trust_remote_code: bool) -> Any:
    with _explained(shown, source), quiet():
        processor = AutoProcessor.from_pretrained(
            source, trust_remote_code=trust_remote_code, **hub
        )
    if not hasattr(processor, "image_processor"):
        raise LoadError(f"cannot use model {shown!r}: its processor takes no images")
    return processor


def load_model(
    name: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    attention: str | None = None,
    revision: str | None = None,
    **where: Any,
) -> Any:
    """The model of :func:`load` alone, for what needs no processor."""
    source, shown = _source(name, revision)
    hub = hub_options(source, shown, revision)
    return _model(source, shown, hub, device, dtype, trust_remote_code, attention, where)


def _model(
    source: str,
    shown: str,
    hub: dict[str, Any],
    device: str | torch.device,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
    attention: str | None,
    where: dict[str, Any],
) -> Any:
    target = None if where else device_of(device)
    if attention is not None:
        where = {**where, "attn_implementation": attention}
    weights = dtype_of(dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    with _explained(shown, source), quiet():
        model, found = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=weights,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **where,
            **hub,
        )
    _check_complete(shown, model, found)
    return (model if target is None else model.to(target)).eval()


def device_of(name: str | torch.device) -> torch.device:
    """The device, if it can be used here (``"auto"``: the accelerator, if there is one).

    Raises:
        LoadError: it cannot; ``usage`` is set.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when built without the device
        why = first_line(error)
        if "device type at start of device string" in why:  # torch lists all that it ever knew
            why = "there is no such device; use auto, cpu, cuda, cuda:1, mps ..."
        message = f"device {str(name)!r} cannot be used here: {why}"
        raise LoadError(message, usage=True) from error
    return device


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of ``"bfloat16"``, ``"bf16"`` and the like; LoadError for other names."""
    if name not in DTYPES:
        message = f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}"
        raise LoadError(message, usage=True)
    return DTYPES[name]


def pad_left(tokenizer: Any) -> None:
    """Have rows of different lengths padded on the left, where the next token has one place for
    all of them, with the end token if the tokenizer has no other for it."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def end_tokens(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """The ids that end an answer: those of the model's generation config, or the tokenizer's where
    it names none."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)


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


def _source(name: str | None, revision: str | None = None) -> tuple[str, str]:
    """What transformers is given, and what messages and records call it."""
    if name is not None and (name != BUNDLED_MODEL or Path(name).exists()):
        return str(_folder_or_id(name)), name if revision is None else f"{name}@{revision}"
    try:
        return str(bundled_model()), BUNDLED_MODEL
    except FileNotFoundError as error:
        raise LoadError(f"{error} with --model") from error


def _folder_or_id(name: str) -> Path | str:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"folder {name!r} holds no model: it has no config.json")
        return path
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if not name.strip() or looks_like_path:
        raise LoadError(f"no such model folder: {name!r}")
    return name


PATIENCE = 8.0
"""Seconds for a first sign of life of the model hub."""


def hub_options(source: str, shown: str, revision: str | None = None) -> dict[str, Any]:
    """What from_pretrained is told of a hub id: its revision and, where the hub cannot be reached,
    to look into the local cache alone. It would try each of a dozen files six times, for minutes.

    Raises:
        LoadError: what is no hub id; a revision of a folder, which has none; or the hub cannot be
            reached, and the model is not in the cache.
    """
    if Path(source).exists():
        if revision is None:
            return {}
        message = f"a revision is for a hub id: {shown!r} is a folder here"
        raise LoadError(message, usage=True)
    try:
        cached = huggingface_hub.try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError as error:
        message = f"no such model: {shown!r} is no folder here, and no hub id, such as owner/name"
        raise LoadError(message, usage=True) from error
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return options
    hub = huggingface_hub.constants.ENDPOINT
    if _answers(f"{hub}/{source}/resolve/{quote(revision or 'main', safe='')}/config.json"):
        return options
    if not isinstance(cached, str):
        raise LoadError(_explain(shown, source, OSError("the hub cannot be reached")))
    return {**options, "local_files_only": True}


def _answers(url: str) -> bool:
    """Whether a server answers at all, whatever it says. A look-up of a name has no limit of its
    own: hence the thread."""
    heard: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # any trouble of network, proxy or certificates
            huggingface_hub.get_session().head(url, timeout=PATIENCE)
            heard.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(heard)


_LAYER = re.compile(r"(.*\blayers?)\.\d+\b")


def _check_complete(shown: str, model: Any, found: dict[str, Any]) -> None:
    """Weights that the checkpoint lacks are drawn at random by transformers, and layers that
    config.json does not name are left out, with notes that :func:`quiet` holds back: such a model
    answers nonsense. Other weights without a place (of a head for training, say) do no harm."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise LoadError(
            f"cannot use model {shown!r}: its checkpoint lacks {len(missing)} of the weights that "
            f"its config.json asks for ({missing[0]} ...)"
        )
    left = sorted(found["unexpected_keys"])
    modules = {name for name, _ in model.named_modules()}
    beyond = [
        name
        for name in left
        if (layer := _LAYER.match(name)) and layer[1] in modules and layer[0] not in modules
    ]
    if beyond:
        raise LoadError(
            f"cannot use model {shown!r}: its checkpoint has layers that its config.json does not "
            f"name ({beyond[0]} ...)"
        )
    if left:
        warnings.warn(
            f"model {shown!r}: {len(left)} weights of the checkpoint have no place in the model of "
            f"its config.json ({left[0]} ...)",
            stacklevel=3,
        )


@contextlib.contextmanager
def _explained(shown: str, source: str) -> Iterator[None]:
    """What transformers raises as one LoadError."""
    try:
        yield
    except Exception as error:  # from_pretrained raises a dozen unrelated types
        raise LoadError(_explain(shown, source, error)) from error


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
