"""Where the files that ship with st3 lie: the small model st3-tiny and sample images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

BUNDLED_MODEL = "st3-tiny"
PACKAGE = "st3_tiny"

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def bundled_model() -> Path:
    """The folder of st3-tiny, for ``AutoModelForImageTextToText.from_pretrained``: in a copy of the
    repository that of its source, otherwise that of the package ``st3-tiny``.

    Raises:
        FileNotFoundError: where neither is there.
    """
    own = ASSETS / BUNDLED_MODEL
    if (own / "config.json").is_file():
        return own
    spec = importlib.util.find_spec(PACKAGE)
    for place in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise FileNotFoundError(
        "the bundled model is a package of its own, which is not installed: pip install "
        "./packages/st3-tiny in a copy of the repository, or name another model"
    )


def sample_images() -> list[Path]:
    """The sample images, in order of their names."""
    return sorted((ASSETS / "samples").glob("*.png"))
