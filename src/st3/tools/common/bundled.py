"""Where the files that ship with st3 lie: the small model st3-tiny and sample images."""

from __future__ import annotations

from pathlib import Path

BUNDLED_MODEL = "st3-tiny"

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def bundled_model() -> Path:
    """The folder of st3-tiny, for ``AutoModelForImageTextToText.from_pretrained``."""
    return ASSETS / BUNDLED_MODEL


def sample_images() -> list[Path]:
    """The sample images, in order of their names."""
    return sorted((ASSETS / "samples").glob("*.png"))
