"""What the gateway tells of itself: metrics, request ids, log lines and spans."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deepseek_triton.gateway.app import create_app
from deepseek_triton.gateway.observe.logs import JsonFormatter
from deepseek_triton.gateway.observe.tracing import Tracer
from deepseek_triton.gateway.settings import GatewaySettings
from tests.support.gateway import HELLO, MODEL, FakeBackend, gateway
from tests.support.waiting import until

SECRET = "the king's new clothes"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
CHAT = "/v1/chat/completions"


def body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], **more}


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def metrics_when_counted(url: str, count: int = 1) -> dict[str, float]:
    """The metrics once so many chats have been counted: a client has its answer a moment before."""
    until(lambda: metrics(url).get(f'gateway_request_seconds_count{{route="{CHAT}"}}') == count)
    return metrics(url)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(pause_s=0.01)


@pytest.fixture
def url(backend: FakeBackend) -> Iterator[str]:
    with gateway(backend) as address:
        yield address


def test_a_streamed_answer_is_counted_token_by_token(url: str) -> None:
    assert httpx.post(url + CHAT, json=body(stream=True)).status_code == 200
    found, chat = metrics_when_counted(url), f'route="{CHAT}"'
    assert found[f'gateway_requests_total{{model="{MODEL}",{chat},status="200"}}'] == 1
    assert found[f'gateway_time_to_first_token_seconds_count{{model="{MODEL}"}}'] == 1
    first = found[f'gateway_time_to_first_token_seconds_sum{{model="{MODEL}"}}']
    assert 0.01 <= first < 60
    num_tokens = HELLO[-1].num_output_tokens
    assert found[f'gateway_inter_token_seconds_count{{model="{MODEL}"}}'] == num_tokens - 1
    between = found[f'gateway_inter_token_seconds_sum{{model="{MODEL}"}}']
    assert 0.01 < between < 60 and first + between >= 0.03  # a token that is seen late shortens the time to the next
    assert found[f'gateway_tokens_total{{kind="input",model="{MODEL}"}}'] == HELLO[-1].num_input_tokens
    assert found[f'gateway_tokens_total{{kind="output",model="{MODEL}"}}'] == num_tokens
    assert found[f'gateway_upstream_seconds_count{{model="{MODEL}",outcome="answered"}}'] == 1
    assert found[f'gateway_queue_seconds_count{{model="{MODEL}"}}'] == 1
    assert found["gateway_upstream_live"] == 0


def test_a_whole_answer_is_counted_too(url: str) -> None:
    httpx.post(url + CHAT, json=body())
    found = metrics_when_counted(url)
    assert found[f'gateway_tokens_total{{kind="output",model="{MODEL}"}}'] == HELLO[-1].num_output_tokens
    assert found[f'gateway_request_seconds_count{{route="{CHAT}"}}'] == 1


def test_clients_words_make_no_series(url: str) -> None:
    for number in range(5):
        httpx.post(url + CHAT, json=body() | {"model": f"nonsense-{number}"})
        httpx.get(f"{url}/nowhere/{number}")
    until(lambda: metrics(url).get('gateway_request_seconds_count{route="other"}') == 5)
    text = httpx.get(f"{url}/metrics").text
    assert "nonsense" not in text and "nowhere" not in text
    found = metrics_when_counted(url, 5)
    assert found[f'gateway_requests_total{{model="unknown",route="{CHAT}",status="404"}}'] == 5
    assert found['gateway_requests_total{model="",route="other",status="404"}'] == 5


def test_a_client_that_leaves_is_counted_with_the_tokens_it_got(backend: FakeBackend, url: str) -> None:
    backend.chunks = HELLO[:2] * 500
    with httpx.stream("POST", url + CHAT, json=body(stream=True)) as response:
        for line in response.iter_lines():
            if "Hel" in line:
                break
    left, given_up = (f'gateway_clients_left_total{{route="{CHAT}"}}',
        f'gateway_upstream_seconds_count{{model="{MODEL}",outcome="given_up"}}')  # fmt: skip
    tokens = f'gateway_tokens_total{{kind="output",model="{MODEL}"}}'

    def is_counted() -> bool:
        found = metrics(url)
        return (found.get(left), found.get(given_up)) == (1, 1) and found.get(tokens, 0) >= 1

    until(is_counted)


@pytest.mark.parametrize("path", [CHAT, "/nowhere", "/metrics"])
def test_every_response_has_the_requests_id(path: str, backend: FakeBackend, url: str) -> None:
    given = httpx.post(url + path, json=body(), headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = [httpx.post(url + path, json=body(), headers={"X-Request-Id": 'a"; x'}) for _ in range(2)]
    ids = {response.headers["x-request-id"] for response in made}
    assert len(ids) == 2 and all(len(each) == 32 for each in ids)
    if path == CHAT:
        assert backend.calls[0].request_id == "mine-1"


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    formatter = JsonFormatter()
    return [json.loads(formatter.format(record)) for record in caplog.records if "gateway.requests" in record.name]


def test_a_log_line_tells_a_request_and_not_its_prompt(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        httpx.post(url + CHAT, json=body(), headers={"X-Request-Id": "mine-2"})
        httpx.get(f"{url}/metrics")
        until(lambda: lines_of(caplog))
    (line,) = lines_of(caplog)
    assert line["request_id"] == "mine-2" and line["status"] == 200 and line["model"] == MODEL
    assert line["output_tokens"] == HELLO[-1].num_output_tokens and 0 < line["seconds"] < 60
    assert SECRET not in caplog.text and not any(SECRET in str(record.__dict__) for record in caplog.records)


def test_prompts_are_logged_where_an_operator_asks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), gateway(FakeBackend(), log_prompts=True) as url:
        httpx.post(url + CHAT, json=body())
    first, second = lines_of(caplog)
    assert first["prompt"][0]["content"] == SECRET and first["request_id"] == second["request_id"]


def test_a_clients_trace_goes_on_to_the_server(backend: FakeBackend, url: str) -> None:
    httpx.post(url + CHAT, json=body(), headers={"traceparent": TRACE, "tracestate": "a=1"})
    httpx.post(url + CHAT, json=body())
    assert backend.calls[0].headers == {"traceparent": TRACE, "tracestate": "a=1"}
    assert backend.calls[1].headers == {}


def test_spans_join_the_clients_trace_and_reach_the_server(backend: FakeBackend) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    app = create_app(GatewaySettings(), backend)
    app.state.observer.tracer = Tracer(provider)

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            await client.post(CHAT, json=body(), headers={"traceparent": TRACE})

    import asyncio

    asyncio.run(ask())
    call, request = memory.get_finished_spans()
    trace, parent = TRACE.split("-")[1:3]
    assert f"{request.context.trace_id:032x}" == f"{call.context.trace_id:032x}" == trace
    assert f"{request.parent.span_id:016x}" == parent and call.parent.span_id == request.context.span_id
    assert backend.calls[0].headers["traceparent"] == f"00-{trace}-{call.context.span_id:016x}-01"
    assert request.name == f"POST {CHAT}"
    assert request.attributes["gateway.output_tokens"] == HELLO[-1].num_output_tokens


@pytest.mark.slow
def test_workers_metrics_are_summed(tmp_path: Any) -> None:
    count = "from deepseek_triton.gateway.observe.metrics import GatewayMetrics as M; m = M(); "
    script = count + "m.requests.labels('/x', 'm', '200').inc(2); m.live.labels('GET').inc()"
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    read = subprocess.run(
        [sys.executable, "-c", count + "print(m.text().decode())"],
        env=environment, check=True, timeout=60, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert 'gateway_requests_total{model="m",route="/x",status="200"} 4.0' in read


@pytest.mark.slow
def test_tracing_without_its_packages_is_told_in_one_line() -> None:
    hide = "import sys; sys.modules['opentelemetry'] = None; "
    script = (
        hide + "from deepseek_triton.gateway.cli import main; sys.exit(main(['serve', '--trace-endpoint', 'http://x']))"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "opentelemetry" in done.stderr and "[trace]" in done.stderr


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/responses/resp_1", "GET /v1/responses/{response_id}"), ("/no/such/path", "GET other")]
)
def test_a_span_is_called_by_its_route_not_by_its_path(path: str, name: str, backend: FakeBackend) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    app = create_app(GatewaySettings(), backend)
    app.state.observer.tracer = Tracer(provider)

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            await client.get(path)

    asyncio.run(ask())
    (span,) = memory.get_finished_spans()
    assert span.name == name
