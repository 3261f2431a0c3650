"""What the server refuses, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ServeError(Exception):
    """A request that gets no answer, and why.

    Attributes:
        status: of the HTTP response.
        code: a word for programs.
        param: the field of the request that is to blame, or None.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(message: str, param: str | None = None, code: str = "invalid_value") -> ServeError:
    """A request that is wrong."""
    return ServeError(400, code, message, param)


def overloaded(message: str, retry_after: int) -> ServeError:
    """A request that came at a bad time."""
    return ServeError(429, "queue_full", message, headers={"Retry-After": str(retry_after)})


def unavailable(message: str = "the server is shutting down: ask another one") -> ServeError:
    return ServeError(503, "shutting_down", message, headers={"Retry-After": "10"})
