"""Webhooks: what goes out, to whom, how often; the hosts are real servers on this machine, the queue is a fake."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest

from deepseek_triton.gateway.jobs import addresses
from deepseek_triton.gateway.jobs.addresses import check_url, is_public, public_address
from deepseek_triton.gateway.jobs.job import QueuedJob, WebhookRefusedError
from deepseek_triton.gateway.jobs.queue import JobQueue
from deepseek_triton.gateway.jobs.webhooks import MAX_TRIES, SECRET_HEAD, Webhooks
from deepseek_triton.gateway.observe.metrics import GatewayMetrics

HOST, SECRET = "hooks.example", "a secret"


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent and answers with `status`; a redirect leads back to it."""

    def __init__(self) -> None:
        self.status = 200
        self.received: list[tuple[dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append((headers, self.rfile.read(int(headers["content-length"]))))
        self.send_response(self.server.status)
        if self.server.status == 307:
            self.send_header("location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@dataclass
class FakeQueue:
    """Has one job whose end is to be told; keeps what is noted of it."""

    job: QueuedJob
    tries: int = 1
    notes: list[tuple[str, float]] = field(default_factory=list)

    async def take_hooks(self, count: int, lease_s: float) -> list[tuple[QueuedJob, int]]:
        return [(self.job, self.tries)]

    async def note_hook(self, job_id: str, outcome: str, delay_s: float = 0.0) -> None:
        self.notes.append((outcome, delay_s))


def ended(url: str, secret: str = SECRET) -> QueuedJob:
    return QueuedJob(
        "job_1", "alice", "/v1/completions", "normal", "completed", 1.0, 9.0, 1, 5, finished_at=2.0,
        response={"status_code": 200, "body": {"text": "é"}}, webhook={"url": url, "secret": secret},
    )  # fmt: skip


def tell(queue: FakeQueue, found: Sequence[str] = ("127.0.0.1",)) -> FakeQueue:
    """One step of webhooks, with names that lead to `found`."""

    async def look_up(host: str, port: int) -> Sequence[str]:
        return found

    async def step() -> None:
        webhooks = Webhooks(cast(JobQueue, queue), GatewayMetrics(), (HOST,), look_up)
        try:
            await webhooks.step()
        finally:
            await webhooks.close()

    asyncio.run(step())
    return queue


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver has no other address."""
    monkeypatch.setattr(addresses, "is_public", lambda address: True)


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize("secret", [SECRET, SECRET_HEAD + base64.b64encode(b"of bytes").decode()])
def test_the_host_gets_the_job_with_a_signature_that_it_can_check(receiver: Receiver, secret: str) -> None:
    url = f"http://{HOST}:{receiver.server_port}/told?by=us"
    assert tell(FakeQueue(ended(url, secret))).notes == [("delivered", 0.0)]
    ((headers, body),) = receiver.received
    assert headers["host"] == f"{HOST}:{receiver.server_port}"
    key = base64.b64decode(secret.removeprefix(SECRET_HEAD)) if secret.startswith(SECRET_HEAD) else secret.encode()
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    event = json.loads(body)
    assert (event["id"], event["type"]) == (headers["webhook-id"], "job.completed")
    assert event["data"]["response"]["body"] == {"text": "é"}
    assert secret not in body.decode()


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize("status", [500, 404, 307])
def test_what_is_not_taken_is_told_again_later_and_given_up_in_the_end(receiver: Receiver, status: int) -> None:
    receiver.status = status
    url = f"http://{HOST}:{receiver.server_port}/"
    delays = []
    for tries in (1, 2, 3):
        ((outcome, delay_s),) = tell(FakeQueue(ended(url), tries)).notes
        assert outcome == ""
        delays.append(delay_s)
    assert 1 <= delays[0] <= 1.5 and 2 <= delays[1] <= 3 and 4 <= delays[2] <= 6
    assert len(receiver.received) == 3, "a redirect isn't followed"
    assert tell(FakeQueue(ended(url), MAX_TRIES)).notes == [("failed", 0.0)]


@pytest.mark.usefixtures("loopback_is_public")
def test_a_host_that_is_not_there_is_tried_again(receiver: Receiver) -> None:
    receiver.server_close()
    ((outcome, delay_s),) = tell(FakeQueue(ended(f"http://{HOST}:{receiver.server_port}/"))).notes
    assert outcome == "" and delay_s >= 1


@pytest.mark.parametrize("found", [("127.0.0.1",), ("93.184.215.14", "10.0.0.1"), ("::1",), ()])
def test_a_name_that_leads_to_a_private_address_is_given_up(receiver: Receiver, found: tuple[str, ...]) -> None:
    assert tell(FakeQueue(ended(f"http://{HOST}:{receiver.server_port}/")), found).notes == [("failed", 0.0)]
    assert receiver.received == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "2002:7f00:1::",
        "64:ff9b::7f00:1", "localhost", "0x7f.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://hooks.example/", "https://other.example/", "https://hooks.example.evil/", "https://u:p@hooks.example/",
        "https://hooks.example/#part", "https://hooks.example:0/", "https://hooks.example:99999/", "//hooks.example/",
        "https://[::1/", "",
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_host_on_the_list_is_refused(url: str) -> None:
    with pytest.raises(WebhookRefusedError):
        check_url(url, (HOST,))


def test_the_address_is_looked_up_once() -> None:
    """So that a second look-up can't give another, private one."""
    asked = []

    async def look_up(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return ["93.184.215.14"]

    assert asyncio.run(public_address(f"https://{HOST.upper()}/x", (HOST,), look_up)) == "93.184.215.14"
    assert asked == [(HOST, 443)]
