"""The body of a chat completion request. What is not supported is refused, never ignored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from st3.methods.policies import read_budget
from st3.tools.serve.errors import ServeError, refused

MAX_VALUES = 20_000
"""Values, keys and separators of a body, at most: each becomes a Python object of up to 100 bytes,
and an entry of the list of errors. A conversation of 64 messages and 256 images has under 5,000."""

# Known to clients of OpenAI and vLLM. A value other than these asks for something that is not done.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "echo": (False,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Of the answers that clients send back: OpenAI's package writes them all, most of them null.
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],)}
# Labels for whoever runs a server: they say nothing about the answer.
_LABELS = ("user", "safety_identifier", "prompt_cache_key")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ImageURL(_Model):
    """detail: taken because clients send it; the model's own processor sets the resolution."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Model):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Model):
    """name: handed to the chat template, which shows it or not."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(min_length=1)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_answered(cls, value: Any) -> Any:
        """A message as clients send an answer back: null for what it does not have; the text of a
        refusal stands in for the content."""
        if not isinstance(value, dict):
            return value
        neutral = _NEUTRAL_IN_MESSAGES
        fields = {
            name: given
            for name, given in value.items()
            if given is not None and not _asks_nothing(given, neutral.get(name, ()))
        }
        refusal = fields.get("refusal")
        if fields.get("role") == "assistant" and isinstance(refusal, str):
            del fields["refusal"]
            fields.setdefault("content", refusal)
        return fields

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Extension(_Model):
    """Under ``st3`` in the request.

    Attributes:
        budget: mean share of the visual tokens over the layers, 0.35 or "35%", of the policy, or of
            the server's own where none is named.
        kept: whether the response shall say what each layer saw of the images; see
            :func:`st3.tools.serve.kept.kept_of`.
    """

    policy: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    budget: float | None = None
    kept: bool | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _share(cls, value: Any) -> float | None:
        return None if value is None else read_budget(value)


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

    @property
    def image_urls(self) -> list[str]:
        """Of all messages, in order."""
        return [
            part.image_url.url
            for message in self.messages
            for part in message.content
            if isinstance(part, ImagePart)
        ]


def read(body: bytes | bytearray) -> ChatRequest:
    """The request in a body.

    Raises:
        ServeError: 400 that names the field and the reason.
    """
    if count_values(body) > MAX_VALUES:
        raise refused(f"the body holds more than {MAX_VALUES} values", code="body_too_complex")
    try:
        # Of UTF-8 only, to a depth of 200, and without half characters.
        data = from_json(body[3:] if body.startswith(_BOM) else body, allow_inf_nan=False)
    except ValueError as error:
        raise refused(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise refused("the body is not a JSON object", code="invalid_json")
    data = {name: value for name, value in data.items() if value is not None}
    for name in _LABELS:
        if not isinstance(data.pop(name, ""), str):
            raise refused(f"{name} is not a string", name)
    for name, neutral in _NEUTRAL.items():
        if name in data and not _asks_nothing(data.pop(name), neutral):
            raise refused(f"{name} is not supported: leave it out", name, "unsupported_field")
    if "stream_options" in data and not data.get("stream"):
        raise refused("stream_options is for answers with stream: true", "stream_options")
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from error


_BOM = b"\xef\xbb\xbf"
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SEPARATORS = (b",", b":", b"[", b"{")


def count_values(body: bytes | bytearray) -> int:
    """At least how many values a parser would make of a body, told without parsing it: its strings
    and its separators outside of strings. Counting ends soon behind :data:`MAX_VALUES`."""
    separators = sum(body.count(mark) for mark in _SEPARATORS)
    if separators <= MAX_VALUES:  # so are the strings: a separator lies between any two
        return separators
    count = place = 0
    for string in _STRING.finditer(body):
        count += 1 + _between(body, place, string.start())
        place = string.end()
        if count > MAX_VALUES:
            return count
    return count + _between(body, place, len(body))


def _between(body: bytes | bytearray, start: int, end: int) -> int:
    return sum(body.count(mark, start, end) for mark in _SEPARATORS)


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Equal to one of them, and no truth value taken for a number."""
    return any(
        bool(value == accepted) and isinstance(value, bool) == isinstance(accepted, bool)
        for accepted in neutral
    )


def _explain(error: ValidationError) -> ServeError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(place)[:100] for place in first["loc"])
    if first["type"] == "extra_forbidden":
        return refused(f"{where} is not supported: leave it out", where, "unsupported_field")
    return refused(f"{where}: {first['msg']}", where)
