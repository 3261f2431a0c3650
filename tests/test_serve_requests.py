"""Bad requests: each gets a 4xx with a reason, and the server lives on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from st3.tools.serve import Engine, Settings, create_app
from tests.serving import CHAT, JSON, body, check, load, picture

SETTINGS = Settings(max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[TestClient]:
    engine = Engine(*load(tiny_model), kv_budget_bytes=64 << 20)
    with TestClient(create_app(engine, SETTINGS), raise_server_exceptions=False) as client:
        yield client


NESTED = b'{"model":' + b"[" * 100_000
BODIES = {
    "nothing": (b"", "JSON"),
    "cut off": (b'{"model": "st3"', "JSON"),
    "a list": (b"[]", "object"),
    "null": (b"null", "object"),
    "not UTF-8": (b'{"model": "\xff\xfe"}', "JSON"),
    "nested": (NESTED, "values"),
    "nested to its end": (NESTED + b"]" * 100_000 + b"}", "values"),
    "nested a little": (b'{"model":' + b"[" * 300 + b"]" * 300 + b"}", "recursion"),
    "not a number": (b'{"temperature": NaN}', "JSON"),
    "infinite": (b'{"temperature": -Infinity}', "JSON"),
    "UTF-16": ('{"model": "st3"}'.encode("utf-16"), "JSON"),
    "a number of 5,000 digits": (b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(client: TestClient, name: str) -> None:
    data, word = BODIES[name]
    check(client, client.post(CHAT, content=data, headers=JSON), 400, word)


def test_the_type_of_the_body_is_checked(client: TestClient) -> None:
    data = json.dumps(body())
    response = client.post(CHAT, content=data, headers={"content-type": "text/plain"})
    check(client, response, 415, "application/json")


def test_a_body_may_have_parameters_in_its_type(client: TestClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    data = json.dumps(body(max_tokens=1))
    assert client.post(CHAT, content=data, headers=headers).status_code == 200


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "describe", **fields}]}


def part(**fields: Any) -> dict[str, Any]:
    return message(content=[fields])


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model"),
    "a model of a wrong type": ({"model": 3}, "model"),
    "no messages": ({"messages": []}, "messages"),
    "messages of a wrong type": ({"messages": "describe"}, "messages"),
    "a message of a wrong type": ({"messages": ["describe"]}, "messages.0"),
    "too many messages": ({"messages": message()["messages"] * 65}, "64 messages"),
    "an unknown role": (message(role="tool"), "role"),
    "no content": (message(content=None), "content"),
    "empty content": (message(content=[]), "content"),
    "an unknown field of a message": (message(mood="good"), "mood"),
    "a name that is none": (message(name="<image> me"), "name"),
    "a call of a tool": (message(role="assistant", tool_calls=[{"id": "a"}]), "tool_calls"),
    "a refusal of the user's": (message(refusal="no"), "refusal"),
    "a user that is a number": ({"user": 7}, "user"),
    "an unknown part": (part(type="input_audio", input_audio={}), "input_audio"),
    "a part without a type": (part(text="describe"), "type"),
    "a text of a wrong type": (part(type="text", text=7), "text"),
    "an image that is a string": (part(type="image_url", image_url="x"), "image_url"),
    "a detail that is none": (
        part(type="image_url", image_url={"url": "data:", "detail": "much"}), "detail"),
    "options of a stream that is none": (
        {"stream_options": {"include_usage": True}}, "stream_options"),
    "half a character": (message(content="\ud800"), ""),
    "a placeholder": (message(content="describe <image>"), "<image>"),
    "a temperature of a wrong type": ({"temperature": "hot"}, "temperature"),
    "a temperature below zero": ({"temperature": -1}, "temperature"),
    "too high a temperature": ({"temperature": 2.1}, "temperature"),
    "no probability": ({"top_p": 0}, "top_p"),
    "too much probability": ({"top_p": 1.1}, "top_p"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "negative tokens": ({"max_tokens": -5}, "max_tokens"),
    "part of a token": ({"max_tokens": 1.5}, "max_tokens"),
    "true tokens": ({"max_tokens": True}, "max_tokens"),
    "tokens as text": ({"max_tokens": "5"}, "max_tokens"),
    "absurdly many tokens": ({"max_tokens": 10**12}, "max_tokens"),
    "more tokens than positions": ({"max_tokens": 2047}, "positions"),
    "two lengths": ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    "too large a seed": ({"seed": 2**70}, "seed"),
    "an empty stop": ({"stop": ""}, "stop"),
    "too many stops": ({"stop": list("abcde")}, "stop"),
    "a long stop": ({"stop": "x" * 1000}, "stop"),
    "a stream of a wrong type": ({"stream": "yes"}, "stream"),
    "unknown options of a stream": ({"stream": True, "stream_options": {"a": 1}}, "stream_options"),
    "a long prompt": (message(content="describe " * 3000), "positions"),
    "a policy of a wrong type": ({"st3": {"policy": 3}}, "policy"),
    "an unknown policy": ({"st3": {"policy": "magic"}}, "magic"),
    "a policy that does not fit": ({"st3": {"policy": "fastv:layer=99"}}, "layer"),
    "a policy of nothing but brackets": ({"st3": {"policy": "random:like=" + "(" * 180}}, ""),
    "an endless policy": ({"st3": {"policy": "st3:" + "tau=1," * 99}}, "policy"),
    "a policy in a file": ({"st3": {"policy": "/etc/policy.json"}}, "unknown policy"),
    "a policy in a file within another": (
        {"st3": {"policy": "random:like=(/etc/policy.json)"}}, "unknown policy"),
    "no share": ({"st3": {"budget": 35}}, "budget 35 is no share"),
    "a share in words": ({"st3": {"budget": "half"}}, "budget half is no share"),
    "a true share": ({"st3": {"budget": True}}, "budget True is no share"),
    "a share that the policy cannot have": (
        {"st3": {"budget": "1%", "policy": "fastv"}}, "cannot be had"),
    "an unknown extension": ({"st3": {"magic": 1}}, "magic"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_wrong_types_and_values(client: TestClient, name: str) -> None:
    fields, word = FIELDS[name]
    request = body(**fields)
    # Not by httpx, which cannot write half a character.
    check(client, client.post(CHAT, content=json.dumps(request), headers=JSON), 400, word)


def test_a_budget_is_of_the_policy_named_or_of_the_servers_own(client: TestClient) -> None:
    for given, policy in (
        ({"budget": 0.5}, "thirds:budget=0.5"),
        ({"budget": "50%", "policy": "fastv"}, "fastv:budget=0.5"),
    ):
        asked = body("describe", picture(), st3=given, max_tokens=2)
        found = client.post(CHAT, json=asked).json()["st3"]
        assert found["policy"] == policy
        assert found["mean_share"] == pytest.approx(0.5, abs=0.04)  # of 16 tokens


def test_a_policy_of_a_huge_number_is_the_clients_fault(client: TestClient) -> None:
    huge = {"policy": "st3:score=mixed99999999999999999999"}
    check(client, client.post(CHAT, json=body("describe", picture(), st3=huge)), 400, "")


UNSUPPORTED: dict[str, Any] = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "response_format": {"type": "json_object"},
    "metadata": {"a": "b"},
    "reasoning_effort": "low",
    "repetition_penalty": 1.1,
    "top_k": 5,
    "anything_else": 1,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_are_not_supported_are_refused(client: TestClient, name: str) -> None:
    response = client.post(CHAT, json=body(**{name: UNSUPPORTED[name]}))
    check(client, response, 400, name)
    assert response.json()["error"]["code"] == "unsupported_field"


NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "skip_special_tokens": True,
    "ignore_eos": False, "tools": [], "tool_choice": "none", "functions": [], "metadata": {},
    "response_format": {"type": "text"}, "logit_bias": None, "seed": None, "stop": None,
    "stream": False, "stream_options": None, "store": False, "user": "me",
    "safety_identifier": "a-b", "prompt_cache_key": "c", "anything_else": None,
}  # fmt: skip


def test_values_that_ask_for_nothing_are_taken(client: TestClient) -> None:
    assert client.post(CHAT, json=body(max_tokens=1, **NEUTRAL)).status_code == 200
    assert client.post(CHAT, json=body(n=True)).status_code == 400
    assert client.post(CHAT, json=body(user=None, max_tokens=1)).status_code == 200


def test_an_answer_may_be_sent_back(client: TestClient) -> None:
    """As it came, and as OpenAI's package dumps it."""
    first = client.post(CHAT, json=body("describe", picture())).json()["choices"][0]["message"]
    dumped = {**first, "audio": None, "function_call": None, "tool_calls": None,
              "annotations": []}  # fmt: skip
    plain = {"role": "assistant", "content": first["content"]}
    answers = []
    for answer in (first, dumped, plain):
        request = body("describe", picture())
        request["messages"] += [answer, {"role": "user", "content": "what is red"}]
        answers.append(client.post(CHAT, json=request))
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_a_refusal_stands_in_for_the_content(client: TestClient) -> None:
    request = body("describe")
    request["messages"] += [
        {"role": "assistant", "content": None, "refusal": "red"},
        {"role": "user", "content": "what", "name": "Ann-1"},
    ]
    refused = client.post(CHAT, json=request).json()
    request["messages"][1] = {"role": "assistant", "content": "red"}
    said = client.post(CHAT, json=request).json()
    assert refused["choices"] == said["choices"]
    assert refused["usage"] == said["usage"]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-45, 5e-324])
def test_a_tiny_temperature_is_greedy(client: TestClient, temperature: float) -> None:
    greedy = client.post(CHAT, json=body("describe", picture())).json()
    answer = client.post(CHAT, json=body("describe", picture(), temperature=temperature))
    assert answer.json()["choices"] == greedy["choices"]


def test_a_byte_order_mark_is_left_out(client: TestClient) -> None:
    data = b"\xef\xbb\xbf" + json.dumps(body(max_tokens=1)).encode()
    assert client.post(CHAT, content=data, headers=JSON).status_code == 200


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    check(client, client.post(CHAT, content=b"\x1f\x8b", headers=headers), 415, "uncompressed")


def test_a_model_by_its_name(client: TestClient) -> None:
    card = client.get("/v1/models/st3").json()
    assert client.get("/v1/models").json()["data"] == [card]
    assert card["id"] == "st3"
    assert card["created"] > 1_700_000_000


def test_a_large_body_is_refused_while_it_comes(client: TestClient) -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(1)
            yield b" " * 50_000

    response = client.post(CHAT, content=endless(), headers=JSON)
    check(client, response, 413, "larger")
    response = client.post(CHAT, content=b"{}", headers={**JSON, "content-length": "9" * 15})
    check(client, response, 413, "larger")


def test_pages_that_do_not_exist(client: TestClient) -> None:
    check(client, client.get("/v1/nothing"), 404, "no such page")
    check(client, client.get(CHAT), 405, "method")
    check(client, client.get("/v1/models/other"), 404, "not served")
    check(client, client.get("/docs"), 404, "no such page")
    check(client, client.post(CHAT, json=body(model="other")), 404, "not served")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": " "}, "model_name"),
        ({"api_key": ""}, "api_key"),
        ({"image_folder": Path("/no/such/folder")}, "not a folder"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"prepare_bytes": 0}, "prepare_bytes"),
        ({"cors_origins": ("example.org",)}, "cors origin"),
        ({"request_timeout": 0}, "request_timeout"),
    ],
)
def test_settings_that_make_no_sense(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)
