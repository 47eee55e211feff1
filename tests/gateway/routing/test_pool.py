"""Several servers behind a real gateway: the complaints of others' users, each by its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.clients import ProtocolError, RequestRejected, ServerOverloaded, ServerUnavailable
from deepseek_triton.gateway.backend.watched_file import LOOK_S
from tests.support.gateway import gateway
from tests.support.gateway_servers import FakeServer, down

FAST: dict[str, Any] = {"probe_interval_s": 0.05, "probe_timeout_s": 0.4, "hang_s": 1.0, "breaker_open_s": 0.5}
CLIENT = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))  # its making is slow
PATH = "/v1/chat/completions"
OVERLOADED = ServerOverloaded("queue is full (max_queue_size=1); retry later", "unavailable")


def ask(url: str, text: str = "Hello", **fields: Any) -> httpx.Response:
    body = {"model": "r1", "messages": [{"role": "user", "content": text}], **fields}
    return CLIENT.post(url + PATH, json=body, timeout=30)


def until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(url: str) -> str:
    return CLIENT.get(f"{url}/metrics").text


def test_breaker_opened_by_one_clients_bad_requests() -> None:
    server = FakeServer(error=RequestRejected("min_tokens is wrong", "invalid"))
    with gateway(servers={"a": server}, **FAST) as url:
        assert {ask(url, stream=stream).status_code for _ in range(10) for stream in (False, True)} == {400}
        server.error = None
        assert ask(url).status_code == 200
        assert 'gateway_breaker_open{backend="a",model="r1"} 0.0' in metrics(url)


def test_breaker_opened_by_load() -> None:
    server = FakeServer(error=OVERLOADED)
    with gateway(servers={"a": server}, **FAST) as url:
        answers = [ask(url) for _ in range(20)]
        assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "1")}
        server.error = None
        assert ask(url).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [ServerUnavailable("gone"), RequestRejected("the kernel failed", "internal"), ProtocolError("no end")]
)
def test_an_open_breaker_refuses_at_once_and_closes_again(error: Exception) -> None:
    server = FakeServer(error=error)
    with gateway(servers={"a": server}, **FAST) as url:
        assert all(ask(url).status_code in (502, 503) for _ in range(5))
        count = len(server.requests)
        refused = ask(url)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1") and len(server.requests) == count
        assert 'gateway_breaker_open{backend="a",model="r1"} 1.0' in metrics(url)
        server.error = None
        until(lambda: ask(url).status_code == 200)
        assert 'gateway_breaker_open{backend="a",model="r1"} 0.0' in metrics(url)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_one_hanging_backend_hangs_nobody(stream: bool) -> None:
    hanging, other = FakeServer(), FakeServer()
    with gateway(servers={"a": hanging, "b": other}, **FAST) as url, ThreadPoolExecutor(20) as pool:
        hanging.is_hanging = True
        began = time.monotonic()
        texts = [f"Hello {index}" for index in range(20)]
        answers = list(pool.map(lambda text: ask(url, text, stream=stream), texts))
        assert {answer.status_code for answer in answers} == {200} and time.monotonic() - began < 20
        assert hanging.requests and len(other.requests) == 20, "they were sent to the other one, unseen"
        began = time.monotonic()
        assert ask(url).status_code == 200 and time.monotonic() - began < 20
        hanging.is_hanging = False
        count = len(hanging.requests)
        until(lambda: bool(ask(url, str(time.time()))) and len(hanging.requests) > count)


@pytest.mark.slow
def test_a_stream_on_a_backend_that_begins_to_hang_ends() -> None:
    server = FakeServer(pause_s=0.2)
    with gateway(servers={"a": server, "b": FakeServer(models_served=())}, **FAST) as url:
        body = {"model": "r1", "messages": [{"role": "user", "content": "a"}], "stream": True}
        with CLIENT.stream("POST", url + PATH, json=body, timeout=10) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.is_hanging = True
            began = time.monotonic()
            assert "not available" in "".join(lines)
            assert time.monotonic() - began < 20


@pytest.mark.slow
def test_one_dead_backend_hangs_nobody_and_its_requests_are_sent_elsewhere() -> None:
    dead, other = FakeServer(), FakeServer()
    with gateway(servers={"a": dead, "b": other}, **FAST) as url, down(dead):
        for index in range(20):
            began = time.monotonic()
            assert ask(url, f"Hello {index}").status_code == 200
            assert time.monotonic() - began < 20
        until(lambda: 'gateway_backend_up{backend="a"} 0.0' in metrics(url))


@pytest.mark.parametrize("error", [ServerUnavailable("broke"), RequestRejected("failed", "internal"), OVERLOADED])
def test_what_nothing_has_come_of_is_sent_elsewhere_and_what_has_begun_is_not(error: Exception) -> None:
    bad, good = FakeServer(error=error), FakeServer()
    with gateway(servers={"a": bad, "b": good}, **FAST, breaker_failures=10**6) as url:
        for index in range(10):
            assert ask(url, f"Hello {index}", stream=bool(index % 2)).status_code == 200
        assert bad.requests and len(good.requests) == 10
        assert 'gateway_backend_retries_total{backend="a",model="r1"}' in metrics(url)
        bad.error_after = 1
        bad.requests.clear()
        good.requests.clear()
        streams = [ask(url, f"Hello {index}", stream=True).text for index in range(10)]
        assert len(bad.requests) + len(good.requests) == 10, "no stream was sent twice"
        assert sum('"error"' in text for text in streams) == len(bad.requests) > 0


def test_retries_are_bounded() -> None:
    servers = {name: FakeServer(error=ServerUnavailable("broke")) for name in "abcdef"}
    with gateway(servers=servers, **FAST, max_retries=2) as url:
        assert ask(url).status_code == 503
        assert sum(len(server.requests) for server in servers.values()) == 3


@pytest.mark.slow
def test_panic_after_all_workers_died() -> None:
    """All are dead and come back: refused meanwhile, at once, and answered again without a restart."""
    servers = {name: FakeServer() for name in "abc"}
    with gateway(servers=servers, **FAST) as url:
        for _ in range(2):
            with down(servers["a"]), down(servers["b"]), down(servers["c"]):
                until(lambda: CLIENT.get(f"{url}/health/ready").status_code == 503)
                for _ in range(20):
                    began = time.monotonic()
                    answer = ask(url)
                    assert answer.status_code == 503 and "retry-after" in answer.headers
                    assert time.monotonic() - began < 20
                assert CLIENT.get(f"{url}/v1/models").status_code == 503
            until(lambda: ask(url).status_code == 200)
            until(lambda: CLIENT.get(f"{url}/health/ready").status_code == 200)
        assert servers["a"].num_reconnected, "the address is resolved again"


@pytest.mark.slow
def test_a_model_is_looked_for_where_it_is() -> None:
    servers = {"a": FakeServer(models_served=("r1",)), "b": FakeServer(models_served=("r2",))}
    with gateway(servers=servers, **FAST, models=("r1", "r2")) as url:
        assert CLIENT.get(f"{url}/health/ready").status_code == 200
        assert [ask(url, model=model).status_code for model in ("r1", "r2", "r3")] == [200, 200, 404]
        with down(servers["b"]):
            until(lambda: CLIENT.get(f"{url}/health/ready").status_code == 503)
            assert [ask(url, model=model).status_code for model in ("r1", "r2")] == [200, 503]


def test_a_conversation_stays_on_its_server() -> None:
    servers = {name: FakeServer() for name in "abcd"}
    with gateway(servers=servers, **FAST) as url:
        for _ in range(8):
            assert ask(url, "The same").status_code == 200
    assert sorted(len(server.requests) for server in servers.values()) == [0, 0, 0, 8]


@pytest.mark.slow
def test_a_drained_server_gets_nothing_new(tmp_path: Path) -> None:
    servers, drained = {"a": FakeServer(), "b": FakeServer()}, tmp_path / "drained"
    with gateway(servers=servers, **FAST, drained=str(drained)) as url:
        assert 'gateway_backend_drained{backend="a"} 0.0' in metrics(url)
        drained.write_text("a\n", encoding="utf-8")
        until(lambda: 'gateway_backend_drained{backend="a"} 1.0' in metrics(url))  # though nobody asks anything
        assert {ask(url, f"Hello {index}").status_code for index in range(10)} == {200} and not servers["a"].requests
        drained.write_text("a\nb\n", encoding="utf-8")
        time.sleep(LOOK_S + 0.05)
        assert ask(url).status_code == 503
        drained.unlink()
        time.sleep(LOOK_S + 0.05)
        assert {ask(url, f"Hello {index}").status_code for index in range(10)} == {200} and servers["a"].requests
