"""The drain after SIGTERM, and the time limit of a request."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import httpx
import pytest

from deepseek_triton.gateway.protection.endings import Endings
from deepseek_triton.gateway.settings import GatewaySettings
from tests.gateway.test_app import CHAT
from tests.support.gateway_process import GatewayProcess, gateway_process
from tests.support.waiting import until

PATH = "/v1/chat/completions"
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def drain_while_streaming(server: GatewayProcess) -> tuple[str, dict[str, httpx.Response], float]:
    """SIGTERM during a stream: its text, what new requests get meanwhile, and how long the process took to end."""
    meanwhile = {}
    with (
        httpx.Client(base_url=server.url, timeout=20) as client,
        httpx.Client(base_url=server.url) as other,
        client.stream("POST", PATH, json={**CHAT, **USAGE}) as stream,
    ):
        parts = stream.iter_text()
        text = next(parts)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: other.get("/health/ready").status_code == 503)
        for path in (PATH, "/v1/models", "/health/ready", "/health/live"):
            meanwhile[path] = other.post(path, json=CHAT) if path == PATH else other.get(path)
        text += "".join(parts)
    server.process.wait(60)
    return text, meanwhile, time.monotonic() - start


@pytest.mark.slow
def test_a_stream_ends_before_the_gateway_does(tmp_path: Path) -> None:
    with gateway_process(tmp_path, num_chunks=60, pause_s=0.03) as server:
        text, meanwhile, _ = drain_while_streaming(server)
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"stop"' in text.replace(" ", "")
        assert [answer.status_code for answer in meanwhile.values()] == [503, 503, 503, 200]
        refused = meanwhile[PATH]
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert refused.json()["error"]["code"] == "draining"
        assert server.process.returncode in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_a_stream_that_is_too_long_ends_with_its_usage_and_an_error(tmp_path: Path) -> None:
    with gateway_process(tmp_path, num_chunks=2000, pause_s=0.03, drain_s=1.5) as server:
        text, _, seconds = drain_while_streaming(server)
        assert seconds < 20  # a minute without the limit
    events = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
    assert events[-1]["error"]["code"] == "draining"
    assert events[-2]["usage"]["completion_tokens"] >= 1
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_background_response_is_computed_and_read_before_the_gateway_ends(tmp_path: Path) -> None:
    with gateway_process(tmp_path, num_chunks=30, pause_s=0.03) as server, httpx.Client(base_url=server.url) as client:
        body = {"model": CHAT["model"], "input": "x", "background": True}
        path = f"/v1/responses/{client.post('/v1/responses', json=body).raise_for_status().json()['id']}"
        server.process.send_signal(signal.SIGTERM)
        states: list[str] = []
        while not states or states[-1] in ("queued", "in_progress"):
            time.sleep(0.1)
            states.append(client.get(path).raise_for_status().json()["status"])
        assert states[0] == "in_progress" and states[-1] == "completed"
        assert client.post("/v1/responses", json=body).status_code == 503
        assert server.process.poll() is None
        server.process.wait(60)


@pytest.mark.slow
def test_a_background_response_that_is_too_long_doesnt_keep_the_gateway(tmp_path: Path) -> None:
    with gateway_process(tmp_path, num_chunks=2000, pause_s=0.03, drain_s=1.0) as server:
        body = {"model": CHAT["model"], "input": "x", "background": True}
        httpx.post(f"{server.url}/v1/responses", json=body).raise_for_status()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_idle_gateway_ends_at_once(tmp_path: Path) -> None:
    with gateway_process(tmp_path) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health/ready").status_code == 200  # this connection is kept
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
        assert time.monotonic() - start < 20


def test_a_request_that_never_ends_is_ended() -> None:
    """The app waits for its client alone: the time limit is the client's end for it."""
    seen: list[str] = []

    async def app(scope: object, receive: object, send: object) -> None:
        while (message := await receive())["type"] == "http.request":  # type: ignore[operator]
            seen.append(message["type"])
        seen.append(message["type"])

    async def receive() -> dict[str, object]:
        if not seen:
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: object) -> None: ...

    settings = GatewaySettings(request_timeout_s=0.1, body_timeout_s=0.1)
    scope = {"type": "http", "path": PATH, "headers": []}
    asyncio.run(asyncio.wait_for(Endings(app, settings)(scope, receive, send), 5))
    assert seen == ["http.request", "http.disconnect"]


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", [False, True])
def test_clients_hear_of_the_time_limit(is_streamed: bool) -> None:
    from deepseek_triton.clients import Chunk
    from tests.support.gateway import FakeBackend, gateway

    backend = FakeBackend([Chunk("a", "", 5, 1)] * 1000, pause_s=0.05)
    with gateway(backend, request_timeout_s=0.5, body_timeout_s=0.5) as url:
        answer = httpx.post(url + PATH, json={**CHAT, "stream": is_streamed})
        until(lambda: (backend.running, backend.cancelled) == (0, 1))
    assert answer.status_code == (200 if is_streamed else 504)
    assert '"code":"timeout"' in answer.text.replace(" ", "")
