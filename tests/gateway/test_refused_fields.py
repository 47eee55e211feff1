"""Nothing is dropped in silence: what a body holds is understood, or refused by name in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types.chat import completion_create_params

from deepseek_triton.gateway.apis.openai_chat.body import ChatBody
from tests.support.gateway import MODEL, FakeBackend, gateway

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with gateway(FakeBackend()) as url, httpx.Client(base_url=url) as client:
        yield client


def test_every_field_of_openais_client_is_known() -> None:
    """Supported, or refused by name: a field of a newer client makes this test fail, not its user wonder."""
    fields = {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream"}
    assert fields <= {*ChatBody.model_fields, *ChatBody.NOT_SUPPORTED}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "model must be a valid string"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "must be a valid list"),
        (user(5), "messages[0].content", "must be a valid string, got 5"),
        (user([]), "messages[0].content", "at least 1 item"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type", "'image_url'"),
        (user([{"type": "input_audio"}]), "messages[0].content[0].type", "'input_audio'"),
        (user([{"type": "text", "text": "x", "cache_control": {}}]), "messages[0].content[0].cache_control", "unknown"),
        (user("x", nam="y"), "messages[0].nam", "did you mean name"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0].role", "'function'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is required"),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages[0].audio", "not supported"),
        ({"tempratur": 1}, "tempratur", "did you mean temperature?"),
        ({"temperature": "1"}, "temperature", "must be a valid number, got '1'"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "must not differ"),
        ({"n": 0}, "n", "greater than"),
        ({"n": 65}, "n", "less than"),
        ({"stop": [1]}, "stop[0]", "valid string"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "must be 'function', got 'custom'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match"),
        ({"tools": [TOOL, TOOL]}, "tools", "different names"),
        ({"tool_choice": "required"}, "tool_choice", "must come with tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "'any'"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "one of tools, time",
        ),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "not supported"),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "demands a call",
        ),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'huge'"),
        ({"audio": {"voice": "x"}}, "audio", "audio is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported, except as ['text']"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"function_call": "auto"}, "function_call", "not supported"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"metadata": {"a": "b"}}, "metadata", "not supported"),
        ({"service_tier": "flex"}, "service_tier", "not supported"),
        ({"verbosity": "low"}, "verbosity", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_is_refused_by_name(client: httpx.Client, change: dict[str, Any], param: str, message: str) -> None:
    answer = client.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "change",
    [
        {"logit_bias": {}},
        {"store": False, "service_tier": "auto", "modalities": ["text"], "metadata": None, "verbosity": "medium"},
        {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k"},
        {"parallel_tool_calls": True, "tools": [TOOL], "tool_choice": "auto"},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "text"}, "stop": None, "n": 1, "seed": None},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_taken(client: httpx.Client, change: dict[str, Any]) -> None:
    assert client.post("/v1/chat/completions", json={**CHAT, **change}).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"model": NaN}', b'{"a":' * 9])
def test_what_is_no_body_is_refused(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_paths_and_methods_have_the_same_form(client: httpx.Client) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("DELETE", "/v1/models", 405)):
        answer = client.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
