"""The body of a chat completion request. What is not supported is refused, never ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from st3.tools.serve.errors import ServeError, refused

# Known to OpenAI's clients; a value other than these would ask for something that is not done.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ImageURL(_Model):
    url: str
    detail: Literal["auto"] | None = None


class ImagePart(_Model):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(min_length=1)]

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class StreamOptions(_Model):
    include_usage: bool = False


class Extension(_Model):
    """Under ``st3`` in the request."""

    policy: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class ChatRequest(_Model):
    model: Annotated[str, Field(max_length=500)]
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    st3: Extension | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def read(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
        ServeError: 400 that names the field and the reason.
    """
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except RecursionError as error:
        raise refused(
            "the body is not valid JSON: nested too deeply", code="invalid_json"
        ) from error
    except ValueError as error:  # malformed, not UTF-8, numbers of thousands of digits
        raise refused(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise refused("the body is not a JSON object", code="invalid_json")
    for name, neutral in _NEUTRAL.items():
        value = data.pop(name, None)
        if value is not None and not any(_same(value, accepted) for accepted in neutral):
            raise refused(f"{name} is not supported: leave it out", name, "unsupported_field")
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from error


def _same(value: Any, accepted: Any) -> bool:
    """Equal, and no truth value taken for a number."""
    return bool(value == accepted) and isinstance(value, bool) == isinstance(accepted, bool)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _explain(error: ValidationError) -> ServeError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(place) for place in first["loc"])
    if first["type"] == "extra_forbidden":
        return refused(f"{where} is not supported: leave it out", where, "unsupported_field")
    return refused(f"{where}: {first['msg']}", where)
