"""st3 as a model of lmms-eval: found by its entry point, named `st3`.

    lmms-eval --model st3 --model_args pretrained=FOLDER,policy=st3-7b --tasks pope

See :mod:`st3.tools.lmms.model`. The harness is the extra ``eval``; nothing of it is imported here.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry asks the entry point for: a ``ModelManifest``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="st3", chat_class_path="st3.tools.lmms.model.TrimmedModel")
