"""What an operator decides about the HTTP side of the server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_ORIGIN = re.compile(r"https?://[^/\s*]+")


@dataclass(frozen=True)
class Settings:
    """Limits and permissions. The engine has its own: model, policy, KV budget, queue.

    Attributes:
        model_name: how clients call the model.
        api_key: if set, requests must carry it as ``Authorization: Bearer ...``.
        allowed_hosts: names that a request's Host header may have; empty: any. On loopback this
            keeps web pages of other sites from reaching the server by a name of their own.
        image_folder: the folder whose files may be named by ``file:`` URLs; None: no files.
        http_images: whether ``http(s):`` URLs of public addresses are fetched.
        cors_origins: web pages of these origins (``https://example.org``; ``*``: all) may ask from
            within a browser; empty: none.
        max_body_bytes: of a request; also of its images together, where they are fetched.
        max_bodies_bytes: of all bodies together that have come and are not prompts yet.
        prepare_bytes: memory in which images are decoded and processed, of all requests together;
            see :func:`~st3.tools.common.limits.image_bytes`. A request that needs more alone is
            refused, others wait. None: 256 MiB, or what an image of ``max_pixels`` needs.
        max_fetching: requests whose images are being fetched at once.
        max_images: of a conversation.
        max_image_bytes: of an encoded image.
        max_pixels: of an image, checked before it is decoded.
        max_total_pixels: of a request's images together.
        max_messages: of a conversation.
        max_tokens: of an answer, at most.
        default_max_tokens: of an answer whose request says nothing.
        request_timeout: seconds from the end of a request's body to the end of its answer.
        body_timeout: seconds in which the body of a request must have come, and in which all of
            its images must have been fetched.
        send_timeout: seconds in which a client must take each piece of a stream.
        shutdown_timeout: seconds that running requests are given when the server is told to stop.
        page: whether there is a page for people at ``/``.
    """

    model_name: str = "st3"
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    image_folder: Path | None = None
    http_images: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 20 << 20
    max_bodies_bytes: int = 256 << 20
    prepare_bytes: int | None = None
    max_fetching: int = 8
    max_images: int = 16
    max_image_bytes: int = 10 << 20
    max_pixels: int = 16_000_000
    max_total_pixels: int = 64_000_000
    max_messages: int = 64
    max_tokens: int = 4096
    default_max_tokens: int = 256
    request_timeout: float = 300.0
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    shutdown_timeout: float = 30.0
    page: bool = True

    def __post_init__(self) -> None:
        if not self.model_name.strip():
            raise ValueError("model_name is empty: clients have to call the model something")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty: leave it out to ask for none")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"cors origin {origin!r} is not of the form https://example.org, or *"
                )
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise ValueError(f"image_folder {str(self.image_folder)!r} is not a folder")
        for name, value in vars(self).items():
            number = name.startswith("max_") or name.endswith(("_timeout", "_tokens", "_bytes"))
            if number and value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
