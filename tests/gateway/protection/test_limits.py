"""CallerLimits of a key: requests, tokens, and requests at one time, in one process and in several."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from deepseek_triton.gateway.protection.keys.caller import Caller
from deepseek_triton.gateway.protection.limits.rates import CallerRates
from deepseek_triton.gateway.protection.limits.slots import NoSlotError, SharedSlots
from tests.gateway.test_app import CHAT
from tests.support.gateway import FakeBackend, gateway
from tests.support.redis import needs_redis, redis_server
from tests.support.waiting import until

ALICE = Caller("alice", requests_per_minute=5, tokens_per_minute=100, max_running=2)
PATH = "/v1/chat/completions"


@pytest.fixture
def fresh_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times a few seconds after a minute's beginning: a window's end in the middle changes no count."""
    shift = 60 - time.time() % 60 + 5
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)


@pytest.mark.usefixtures("fresh_window")
def test_requests_of_a_minute_are_counted() -> None:
    with gateway(FakeBackend(), requests_per_minute=3) as url, httpx.Client(base_url=url) as client:
        answers = [client.get("/v1/models") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0", "0"]
    refused = answers[3]
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert (refused.json()["error"]["type"], refused.json()["error"]["code"]) == (
        "rate_limit_error",
        "rate_limit_exceeded",
    )


@pytest.mark.usefixtures("fresh_window")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_tokens_are_counted_from_usage(is_streamed: bool) -> None:
    with gateway(FakeBackend(), tokens_per_minute=10) as url, httpx.Client(base_url=url) as client:
        answers = []
        for _ in range(3):  # 8 tokens each: the second exceeds the limit, the third meets that
            answers.append(client.post(PATH, json={**CHAT, "stream": is_streamed}))
            _ = answers[-1].text
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-tokens"] for answer in answers] == ["10", "2", "0"]
    # 16 tokens are 6 too many: they leave the window a part of a minute after it has ended.
    assert 60 < int(answers[2].headers["retry-after"]) <= 120


@pytest.mark.usefixtures("fresh_window")
def test_anthropics_clients_read_their_own_headers() -> None:
    with gateway(FakeBackend(), requests_per_minute=1) as url, httpx.Client(base_url=url) as client:
        client.get("/v1/messages")
        answer = client.get("/v1/messages")
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.headers["anthropic-ratelimit-requests-limit"] == "1"
    assert answer.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert int(answer.headers["retry-after"]) >= 1


@contextlib.contextmanager
def running(url: str, count: int, backend: FakeBackend) -> Iterator[list[httpx.Response]]:
    """Streams that run until the block ends."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=url, timeout=20))
        before = backend.running
        yield [stack.enter_context(client.stream("POST", PATH, json={**CHAT, "stream": True})) for _ in range(count)]
    until(lambda: backend.running <= before)


@pytest.mark.parametrize("settings", [{"max_running_per_key": 2}, {"max_running": 2}])
def test_requests_at_one_time_are_bounded(settings: dict[str, Any]) -> None:
    from deepseek_triton.clients import Chunk

    backend = FakeBackend([Chunk("a", "", 5, 1)] * 300, pause_s=0.02)
    with gateway(backend, **settings) as url:
        with running(url, 2, backend) as responses:
            assert [response.status_code for response in responses] == [200, 200]
            refused = httpx.post(f"{url}{PATH}", json=CHAT)
            assert refused.status_code == (429 if "max_running_per_key" in settings else 503)
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "too_many_running"
        with running(url, 1, backend) as responses:  # the slots are free again
            assert responses[0].status_code == 200


def test_usage_of_a_client_that_leaves_is_counted() -> None:
    from deepseek_triton.clients import Chunk

    backend = FakeBackend([Chunk("a", "", 5, 1)] * 300, pause_s=0.02)
    with gateway(backend, tokens_per_minute=1000) as url:
        with running(url, 1, backend) as responses:
            next(responses[0].iter_text())
        until(lambda: int(httpx.get(f"{url}/v1/models").headers["x-ratelimit-remaining-tokens"]) < 1000)


@pytest.mark.slow
@needs_redis
def test_processes_share_what_redis_counts() -> None:
    async def use(url: str) -> None:
        one, other = CallerRates(url), CallerRates(url)
        seen = [await (one, other)[turn % 2].take(ALICE) for turn in range(6)]
        assert [states[-1].wait_s > 0 for states in seen] == [False] * 5 + [True]
        await one.charge(ALICE, 250)
        tokens = (await other.take(ALICE))[0]
        assert tokens.kind == "tokens" and tokens.remaining == 0 and tokens.wait_s > 0
        assert (await other.take(Caller("bob", 5, 100, 2)))[0].wait_s == 0
        slots = [SharedSlots(url, 3, lease_s=lease_s) for lease_s in (60, 60, 0.5)]
        taken = [await slots[0].take(ALICE), await slots[1].take(ALICE)]
        with pytest.raises(NoSlotError) as refusal:
            await slots[1].take(ALICE)
        assert refusal.value.is_own
        bob = Caller("bob", 0, 0, 0)
        await slots[2].take(bob)
        with pytest.raises(NoSlotError) as refusal:
            await slots[0].take(bob)
        assert not refusal.value.is_own
        await asyncio.sleep(0.52)  # the lease of a worker that died
        await slots[0].take(bob)
        await slots[0].release(ALICE, taken[1])
        await slots[1].take(ALICE)
        for used in (*(shared.close for shared in slots), one.close, other.close):
            await used()

    with redis_server() as url:
        asyncio.run(use(url))


@pytest.mark.slow
@needs_redis
def test_two_gateways_share_the_limits_of_a_key() -> None:
    with redis_server() as redis, contextlib.ExitStack() as stack:
        urls = [stack.enter_context(gateway(FakeBackend(), redis_url=redis, requests_per_minute=10)) for _ in range(2)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda index: httpx.get(f"{urls[index % 2]}/v1/models"), range(24)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) in (10, 11)  # 11: a minute's end lies between
    assert set(statuses) == {200, 429}


def test_without_its_redis_a_gateway_refuses() -> None:
    with gateway(FakeBackend(), redis_url="redis://127.0.0.1:1/0", requests_per_minute=5) as url:
        answer = httpx.get(f"{url}/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "limits_unavailable")
    assert answer.headers["retry-after"] == "1"


@pytest.mark.slow
def test_an_answer_in_the_background_keeps_its_slot_and_counts() -> None:
    from deepseek_triton.clients import Chunk

    backend = FakeBackend([*[Chunk("a", "", 5, 1)] * 20, Chunk("", "stop", 5, 20)], pause_s=0.05)
    body = {"model": "fake", "input": "x", "background": True}
    with gateway(backend, max_running_per_key=1, tokens_per_minute=1000) as url, httpx.Client(base_url=url) as client:
        assert client.post("/v1/responses", json=body).status_code == 200
        refused = client.post("/v1/responses", json=body)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_running"
        deadline = time.monotonic() + 30
        while (answer := client.get("/v1/models")).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert answer.headers["x-ratelimit-remaining-tokens"] == "975"
