"""`/v1/jobs` of a real gateway with a real Redis and a backend whose answers the test writes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from deepseek_triton.clients import Chunk, ServerOverloaded, ServerUnavailable
from deepseek_triton.gateway.app import create_app
from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.protection.keys.store import open_store
from deepseek_triton.gateway.settings import GatewaySettings
from tests.gateway.test_app import CHAT
from tests.support.gateway import MODEL, FakeBackend, gateway
from tests.support.gateway_servers import FakeServer
from tests.support.redis import needs_redis
from tests.support.waiting import until

PATH = "/v1/chat/completions"
JOB: dict[str, Any] = {"endpoint": PATH, "body": CHAT}
SLOW = [Chunk("a", "", 5, index + 1) for index in range(400)]


def ended(client: httpx.Client, job_id: str, timeout_s: float = 60) -> dict[str, Any]:
    """The job, when it has ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}").json()
        if job["finished_at"] is not None:
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


def wait_until_running(client: httpx.Client, job_id: str, status: str = "running") -> None:
    until(lambda: client.get(f"/v1/jobs/{job_id}").json()["status"] == status)


def submit(client: httpx.Client, **more: Any) -> str:
    answer = client.post("/v1/jobs", json={**JOB, **more})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend, redis_url: str, store: redis.Redis) -> Iterator[httpx.Client]:
    with gateway(backend, redis_url=redis_url) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


@needs_redis
def test_a_job_is_submitted_polled_and_answered(client: httpx.Client) -> None:
    submitted = client.post("/v1/jobs", json=JOB)
    assert submitted.status_code == 202 and submitted.headers["location"] == f"/v1/jobs/{submitted.json()['id']}"
    assert submitted.json()["status"] in ("queued", "running", "completed")
    job = ended(client, submitted.json()["id"])
    assert (job["status"], job["attempts"], job["response"]["status_code"]) == ("completed", 1, 200)
    assert job["response"]["body"]["choices"][0]["message"]["content"] == "Hello"
    assert job["response"]["body"]["usage"]["total_tokens"] == 8


@needs_redis
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"body": {**CHAT, "tempratur": 1}}, "body.tempratur"),
        ({"body": {"model": "fake"}}, "body.messages"),
        ({"body": []}, "body"),
        ({"endpoint": "/v1/responses", "body": {"model": "fake", "input": "x", "background": True}}, "body.background"),
        ({"priority": "urgent"}, "priority"),
        ({"ttl_s": 1e9}, "ttl_s"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"webhook": {"url": "https://example.org", "secret": "0123456789abcdef"}}, "webhook.url"),
        ({"webhook": {"url": "https://example.org", "secret": "short"}}, "webhook.secret"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_wrong_is_refused_at_once(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/jobs", json={**JOB, **change})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


@pytest.mark.slow
@needs_redis
def test_a_streams_events_can_be_read_on_after_a_break(client: httpx.Client, backend: FakeBackend) -> None:
    backend.pause_s = 0.05
    job_id = submit(client, body={**CHAT, "stream": True})
    seen: list[tuple[str, str, Any]] = []

    def read(after: str, count: int) -> None:
        event_id = kind = ""
        with client.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": after}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = value
                elif name == "event":
                    kind = value
                elif name == "data":
                    seen.append((event_id, kind, json.loads(value)))
                    if len(seen) == count:
                        return

    read("0", 3)
    read(seen[-1][0], 100)
    assert [kind for _, kind, _ in seen] == ["queued", "running", *["chunk"] * (len(seen) - 3), "completed"]
    deltas = [data["choices"][0]["delta"] for _, kind, data in seen if kind == "chunk" and data["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
    assert seen[-1][2]["id"] == job_id and seen[-1][2]["response"]["body"] == [
        data for _, kind, data in seen if kind == "chunk"
    ]
    wrong = client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "x"})
    assert wrong.status_code == 400


@pytest.mark.slow
@needs_redis
def test_cancel_ends_what_runs_and_frees_its_slot(client: httpx.Client, backend: FakeBackend) -> None:
    backend.chunks, backend.pause_s = SLOW, 0.02
    job_id = submit(client)
    wait_until_running(client, job_id)
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    until(lambda: (backend.running, backend.cancelled) == (0, 1))
    again = client.post(f"/v1/jobs/{job_id}/cancel")
    assert again.status_code == 200 and again.json()["status"] == "cancelled" and backend.cancelled == 1


@pytest.mark.slow
@needs_redis
def test_a_refused_request_fails_at_once_and_a_failing_server_is_asked_again(
    client: httpx.Client, backend: FakeBackend
) -> None:
    job = ended(client, submit(client, body={**CHAT, "model": "unknown"}))
    assert (job["status"], job["attempts"], job["response"]["status_code"]) == ("failed", 1, 404)
    backend.error = ServerUnavailable("it died")
    job_id = submit(client, max_attempts=2)
    wait_until_running(client, job_id, "queued")
    job = ended(client, job_id)
    assert (job["status"], job["attempts"], job["response"]["status_code"]) == ("failed", 2, 503)


@pytest.mark.slow
@needs_redis
def test_load_that_a_server_refuses_doesnt_count(client: httpx.Client, backend: FakeBackend) -> None:
    backend.error = ServerOverloaded("full")
    job_id = submit(client, max_attempts=1)
    until(lambda: 'gateway_job_attempts_total{outcome="busy"}' in client.get("/metrics").text)
    backend.error = None
    job = ended(client, job_id)
    assert (job["status"], job["attempts"]) == ("completed", 1) and len(backend.requests) >= 2


@pytest.mark.slow
@needs_redis
def test_what_an_open_breaker_refuses_doesnt_count(redis_url: str, store: redis.Redis) -> None:
    server = FakeServer((MODEL,), error=ServerUnavailable("it died"))
    settings: dict[str, Any] = {"breaker_failures": 1, "breaker_open_s": 1.2, "redis_url": redis_url}
    with (
        gateway(servers={"a": server}, **settings) as url,
        httpx.Client(base_url=url, timeout=10) as client,
    ):
        assert client.post(PATH, json=CHAT).status_code == 503  # it opens the breaker
        server.error = None
        job = ended(client, submit(client, max_attempts=1))
        assert (job["status"], job["attempts"]) == ("completed", 1)
        assert 'gateway_job_attempts_total{outcome="busy"} 1.0' in client.get("/metrics").text


@needs_redis
def test_a_job_belongs_to_its_key(redis_url: str, store: redis.Redis, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    texts = []
    for name in ("alice", "bob"):
        key, text = ApiKey.make(name, tokens_per_minute=1000)
        asyncio.run(open_store(keys).add(key))
        texts.append({"Authorization": f"Bearer {text}"})
    with gateway(FakeBackend(), redis_url=redis_url, keys=keys) as url, httpx.Client(base_url=url) as client:
        assert client.post("/v1/jobs", json=JOB).status_code == 401
        client.headers = texts[0]
        job_id = submit(client)
        assert ended(client, job_id)["status"] == "completed"
        # The tokens that it took are on its key's account.
        until(lambda: client.get("/v1/models").headers["x-ratelimit-remaining-tokens"] == "992")
        client.headers = texts[1]
        for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
            refused = client.request(method, f"/v1/jobs/{job_id}{path}")
            assert refused.status_code == 404 and refused.json()["error"]["code"] == "job_not_found"
        assert client.get("/v1/models").headers["x-ratelimit-remaining-tokens"] == "1000"


@pytest.mark.slow
@needs_redis
def test_past_the_limit_a_job_is_refused(redis_url: str, store: redis.Redis) -> None:
    settings: dict[str, Any] = {"redis_url": redis_url, "job_concurrency": 0, "max_jobs_waiting": 2}
    with gateway(FakeBackend(), **settings) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):
            submit(client)
        refused = client.post("/v1/jobs", json=JOB)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        until(lambda: 'gateway_jobs_waiting{priority="normal"} 2.0' in client.get("/metrics").text)
        text = client.get("/metrics").text
        assert "gateway_job_oldest_seconds" in text and "gateway_jobs_running 0.0" in text


@pytest.mark.slow
@needs_redis
def test_the_same_idempotency_key_is_the_same_job(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "mine"}
    first, second = (client.post("/v1/jobs", json=JOB, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202) and first.json()["id"] == second.json()["id"]
    assert client.post("/v1/jobs", json={**JOB, "priority": "low"}, headers=headers).status_code == 409


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/jobs"), ("GET", "/v1/jobs/x"), ("GET", "/v1/jobs/x/events"), ("POST", "/v1/jobs/x/cancel")],
)
def test_without_redis_the_queue_is_off_and_the_rest_works(method: str, path: str) -> None:
    with gateway(FakeBackend()) as url, httpx.Client(base_url=url) as client:
        answer = client.request(method, path, json=JOB if path == "/v1/jobs" else None)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_off"
        assert "the queue is off" in answer.json()["error"]["message"]
        assert client.post(PATH, json=CHAT).status_code == 200


def test_while_redis_is_away_jobs_are_refused_and_workers_wait() -> None:
    with gateway(FakeBackend(), redis_url="redis://127.0.0.1:1/0", max_running=0, max_running_per_key=0) as url:
        answer = httpx.post(f"{url}/v1/jobs", json=JOB)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


@pytest.mark.slow
@needs_redis
def test_a_worker_alone_runs_jobs_and_gives_them_back_at_its_end(
    redis_url: str, store: redis.Redis, backend: FakeBackend
) -> None:
    backend.chunks, backend.pause_s = SLOW, 0.02
    settings = GatewaySettings(redis_url=redis_url, job_concurrency=2)

    async def run(job_id: str, client: httpx.Client) -> None:
        async with create_app(settings, backend).state.alone():
            await asyncio.to_thread(wait_until_running, client, job_id)

    with gateway(FakeBackend(), redis_url=redis_url, job_concurrency=0) as url, httpx.Client(base_url=url) as client:
        job_id = submit(client)
        asyncio.run(run(job_id, client))
        job = client.get(f"/v1/jobs/{job_id}").json()
        assert (job["status"], job["attempts"], backend.running) == ("queued", 0, 0)
