"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a torch without CUDA.

Its compiled library does not load there, and its import then fails over two operators that it
knows the shapes of. Nothing here calls them (they are for object detection), so naming them is
enough. Run with the Python of an environment of its own, once: it edits the installed file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

NAMES = """
if not _has_ops():
    _names = torch.library.Library("torchvision", "DEF")
    _names.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _names.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

spec = importlib.util.find_spec("torchvision")
if spec is not None and spec.origin is not None:
    extension = Path(spec.origin).with_name("extension.py")
    text = extension.read_text()
    if NAMES not in text:
        extension.write_text(text + NAMES)
