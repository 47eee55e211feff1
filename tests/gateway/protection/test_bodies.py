"""Bounds on prompts and schemas, other sites' pages, and logs that hold nothing of a client's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.test_app import CHAT
from tests.support.gateway import FakeBackend, gateway

PATH = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {f"name{index}": {"type": "string"} for index in range(100)}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
SECRET = "my-secret-prompt"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with gateway(FakeBackend(), max_prompt_chars=1000, max_schema_chars=1000) as url:
        yield url


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (PATH, {"messages": user("x" * 1000)}, "the prompt has 1"),
        (PATH, {"messages": user("xx") * 200}, "the prompt has"),
        ("/v1/completions", {"prompt": ["x" * 501] * 2}, "the prompt has 1002 characters"),
        ("/v1/responses", {"input": "hi", "instructions": "x" * 1001}, "the prompt has 1003 characters"),
        (PATH, {"response_format": FORM}, "response_format has"),
        ("/v1/responses", {"text": {"format": FORM}}, "text has"),
    ],
)
def test_prompts_and_schemas_are_bounded(url: str, path: str, fields: dict[str, Any], message: str) -> None:
    answer = httpx.post(url + path, json={"model": "fake", **fields})
    assert answer.status_code == 413 and message in answer.json()["error"]["message"]


def test_a_tool_is_bounded_by_itself() -> None:
    with gateway(FakeBackend(), max_schema_chars=1000) as url:
        answer = httpx.post(url + PATH, json={**CHAT, "tools": [{**TOOL, "function": {"name": "g"}}, TOOL]})
        assert answer.status_code == 413 and "tools[1] has" in answer.json()["error"]["message"]


def test_characters_count_not_bytes(url: str) -> None:
    answer = httpx.post(url + PATH, json={**CHAT, "messages": user("🚀" * 900)})
    assert answer.status_code == 200


ORIGIN = "https://pages.example"


@pytest.mark.parametrize("is_named", [False, True])
def test_other_sites_pages_are_let_in_by_name_alone(is_named: bool) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    with gateway(FakeBackend(), cors_origins=(ORIGIN,) if is_named else ()) as url:
        preflight = httpx.options(url + PATH, headers=asked)
        answer = httpx.post(url + PATH, json=CHAT, headers={"Origin": ORIGIN})
        other = httpx.post(url + PATH, json=CHAT, headers={"Origin": "https://evil.example"})
    assert (preflight.status_code == 200) == is_named
    assert answer.headers.get("access-control-allow-origin") == (ORIGIN if is_named else None)
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.slow
def test_logs_hold_no_prompt_and_no_key(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": f"Bearer {SECRET}"}
    bodies: list[Any] = [
        {**CHAT, "messages": user(SECRET)},
        {**CHAT, "messages": user(SECRET), "stream": True},
        {**CHAT, "messages": SECRET},
        {**CHAT, "temperature": SECRET},
        {**CHAT, SECRET: 1},
        {**CHAT, "model": SECRET},
        [SECRET],
    ]
    for error in (None, RuntimeError("broken")):
        with gateway(FakeBackend(error=error)) as url:
            for body in bodies:
                httpx.post(url + PATH, json=body, headers=headers)
            httpx.post(url + PATH, content=b'{"messages": "' + SECRET.encode(), headers=headers)
    told = caplog.text + "".join(capfd.readouterr())
    assert "deepseek_triton.gateway" in told and SECRET not in told
