"""The page at ``/``: ask about a picture, untrimmed and trimmed side by side.

Its files are served as they are and need no key; it asks the API as any other client does, with the
key that its reader enters. Nothing is fetched from elsewhere, and no script or style stands in the
page itself, so that the Content-Security-Policy can forbid both.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from st3.methods.policies import presets
from st3.tools.common.bundled import bundled_model, sample_images
from st3.tools.serve.engine import Engine
from st3.tools.serve.errors import ServeError
from st3.tools.serve.settings import Settings

_HERE = Path(__file__).parent
_FILES = {
    "/": ("page.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/api.js": ("api.js", "text/javascript"),
    "/page/picture.js": ("picture.js", "text/javascript"),
    "/page/page.js": ("page.js", "text/javascript"),
}
_SAMPLES = "/page/samples/"

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}

# What st3-tiny was trained on; other models get the first of the others.
_QUESTIONS = ("describe the image in detail.", "what is at the top left?", "what is in the center?")
_ELSEWHERE = ("Describe the image in detail.", "What is written here?", "What is unusual here?")


def is_open(path: str) -> bool:
    """Whether a path is one of the page's own files, which hold no secrets and need no key."""
    return path in _FILES or path.startswith(_SAMPLES)


def add_page(app: FastAPI, engine: Engine, settings: Settings) -> None:
    """Add the page, its files, and ``/page/about``, what it has to know of this server."""
    for path, (name, kind) in _FILES.items():
        text = (_HERE / name).read_bytes()
        app.add_api_route(path, _answer(text, kind), methods=["GET"], response_model=None)

    @functools.cache
    def samples() -> dict[str, bytes]:
        """Pictures for the bundled model, which knows nothing else."""
        try:
            bundled = Path(str(engine.model.config._name_or_path)) == bundled_model()
        except (AttributeError, FileNotFoundError):  # a model made in memory; not installed
            bundled = False
        return {path.name: path.read_bytes() for path in sample_images()} if bundled else {}

    async def about() -> Response:
        return JSONResponse(_about(engine, settings, list(samples())), headers=HEADERS)

    async def sample(name: str) -> Response:
        found = samples().get(name)
        if found is None:
            raise ServeError(404, "not_found", "there is no such picture")
        return Response(found, media_type="image/png", headers=HEADERS)

    app.add_api_route("/page/about", about, methods=["GET"], response_model=None)
    app.add_api_route(_SAMPLES + "{name}", sample, methods=["GET"], response_model=None)


def _answer(text: bytes, kind: str) -> Any:
    async def answer() -> Response:
        return Response(text, media_type=kind, headers=HEADERS)

    return answer


def _about(engine: Engine, settings: Settings, samples: list[str]) -> dict[str, Any]:
    names = [engine.policy, *presets(), "st3", "fastv"]
    return {
        "model": settings.model_name,
        "policy": engine.policy,
        "policies": list(dict.fromkeys(names)),
        "layers": len(engine.trimmer(engine.policy).parts.layers),
        "device": str(engine.model.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "max_tokens": settings.max_tokens,
        "max_image_bytes": settings.max_image_bytes,
        "samples": samples,
        "questions": list(_QUESTIONS if samples else _ELSEWHERE),
    }
