"""What clients get when servers fail, and when there is more to do than can be done."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from deepseek_triton.clients import GenerateRequest, Generation, RequestRejected, ServerUnavailable
from deepseek_triton.gateway.backend.routing.answer_cache import AnswerCache
from deepseek_triton.gateway.settings import GatewaySettings
from tests.gateway.routing.test_canary import PATHS
from tests.gateway.routing.test_pool import CLIENT, FAST, ask, until
from tests.support.gateway import gateway
from tests.support.gateway_servers import FakeServer, down

BROKEN = ServerUnavailable("gone")


def what(answer: httpx.Response) -> tuple[int, str, str]:
    headers = answer.headers
    return answer.status_code, headers.get("x-deepseek-model", ""), headers.get("x-deepseek-degraded", "")


@pytest.mark.slow
def test_a_fallback_answers_in_every_api_and_says_so() -> None:
    servers = {"a": FakeServer(error=BROKEN), "b": FakeServer(models_served=("small",))}
    with gateway(servers=servers, **FAST, fallbacks=("r1=gone", "r1=small")) as url:
        for path, body in PATHS.items():
            for stream in (False, True):
                answer = CLIENT.post(url + path, json={**body, "stream": stream}, timeout=30)
                assert what(answer) == (200, "small", "fallback"), answer.text
        assert 'gateway_degraded_total{how="fallback",model="r1"} 8.0' in CLIENT.get(f"{url}/metrics").text


@pytest.mark.slow
def test_fallback_never_left() -> None:
    big, small = FakeServer(), FakeServer(models_served=("small",))
    with gateway(servers={"a": big, "b": small}, **FAST, fallbacks=("r1=small",)) as url:
        for _ in range(2):
            with down(big):
                assert {what(ask(url)) for _ in range(8)} == {(200, "small", "fallback")}
            until(lambda: what(ask(url)) == (200, "r1", ""))
            assert {what(ask(url)) for _ in range(5)} == {(200, "r1", "")}


@pytest.mark.parametrize("error", [RequestRejected("temperature is wrong", "invalid"), BROKEN])
def test_a_clients_fault_and_a_begun_stream_fall_back_on_nothing(error: Exception) -> None:
    big, small = FakeServer(error=error, error_after=1), FakeServer(models_served=("small",))
    with gateway(servers={"a": big, "b": small}, **FAST, fallbacks=("r1=small",)) as url:
        assert '"error"' in ask(url, stream=True).text
        big.error_after = 0
        if error is not BROKEN:
            assert what(ask(url)) == (400, "", "")
        assert len(small.requests) == 0


def test_what_a_fallback_refuses_is_no_fault_of_the_client() -> None:
    small = FakeServer(models_served=("small",), error=RequestRejected("the prompt is too long", "invalid"))
    with gateway(servers={"a": FakeServer(error=BROKEN), "b": small}, **FAST, fallbacks=("r1=small",)) as url:
        answer = ask(url)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_a_kept_answer_is_the_last_resort(stream: bool) -> None:
    server = FakeServer()
    with gateway(servers={"a": server}, **FAST, answer_cache_bytes=2**20) as url:
        before = ask(url, temperature=0, stream=stream)
        assert what(before) == (200, "r1", "")
        ask(url, "Warm")
        with down(server):
            answer = ask(url, temperature=0)
            assert what(answer) == (200, "r1", "cached")
            assert answer.json()["choices"][0]["message"]["content"] == "Hello"
            assert "Hello" in ask(url, temperature=0, stream=True).text
            for other in (ask(url), ask(url, "Warm"), ask(url, temperature=0, max_tokens=7)):
                assert other.status_code == 503 and "retry-after" in other.headers


def test_the_cache_is_bounded() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    cache = AnswerCache(10_000, 60, clock)
    keys = [cache.key("m", GenerateRequest(prompt=f"{index}", temperature=0)) for index in range(100)]
    for key in keys:
        assert key is not None
        cache.put(key, [Generation("a" * 100, "stop", 1, 100)])
        assert cache.num_bytes <= 10_000
    assert not cache.get(keys[0]) and cache.get(keys[-1])
    clock.now = 61
    assert not cache.get(keys[-1])
    assert cache.key("m", GenerateRequest(prompt="a")) is None
    assert cache.key("m", GenerateRequest(prompt="a", temperature=0, num_return_sequences=2)) is None


@pytest.mark.slow
def test_load_is_shed_by_priority_and_answers_get_shorter() -> None:
    server = FakeServer(pause_s=1.0)
    settings: dict[str, Any] = {"capacity": 4, "pressure_max_tokens": 16, **FAST, "probe_timeout_s": 5.0}
    with gateway(servers={"a": server}, **settings) as url, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, url) for _ in range(3)]
        until(lambda: server.running == 3)
        began = time.monotonic()
        shed = ask(url, priority=3)
        assert shed.status_code == 503 and shed.headers["retry-after"] == "1" and time.monotonic() - began < 20
        waiting.append(pool.submit(ask, url))
        until(lambda: server.running == 4)
        assert server.requests[-1].max_tokens == 16
        assert ask(url).status_code == 503
        assert ask(url, priority=1).status_code == 200
        assert [what(one.result())[2] for one in waiting] == ["", "", "", "shortened"]
        assert what(ask(url)) == (200, "r1", "")
        assert 'gateway_shed_total{model="r1"} 2.0' in CLIENT.get(f"{url}/metrics").text


@pytest.mark.parametrize("text", ["r1", "r1=", "=r1", "r1=r1"])
def test_a_fallback_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="--fallback must be MODEL=OTHER"):
        GatewaySettings(fallbacks=(text,))
