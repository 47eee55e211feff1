"""Two real tritonservers behind one gateway, under load: one is drained and replaced, one is killed."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.gateway.backend import addresses
from tests.conftest import NAME, end_at_once
from tests.support.byte_models import write_byte_model
from tests.support.gateway import gateway
from tests.support.waiting import until

pytestmark = [pytest.mark.server, pytest.mark.slow]

wait = functools.partial(until, limit_s=60, every_s=0.1)  # the gateway's metrics are asked, while it is under load
NUM_CLIENTS = 6
LONG = 60  # tokens: a fraction of a second
PAUSE_S = 0.4  # of a client between its requests: enough for load, and a server starts beside it without delay


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    checkpoint = write_byte_model(folder / "checkpoint")
    build(BuildOptions(checkpoint, NAME, folder / "models", max_seq_len=128))
    return folder / "models"


@pytest.fixture(scope="module")
def pair(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonServer, ...]]:
    """Two servers of the same model, which a test may end and start again."""
    folder = tmp_path_factory.mktemp("pair")
    with contextlib.ExitStack() as stack:
        servers = tuple(stack.enter_context(_server(repository, folder / f"{name}.log")) for name in "ab")
        yield servers
        for server in servers:
            end_at_once(server)


def _server(repository: Path, log: Path) -> TritonServer:
    return TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log_file=log)


@dataclass
class Load:
    """Clients that ask again and again, every other request as a stream.

    outcomes: "answered"; "broken": a stream that ended with an error after it had begun; else what went wrong.
    broken_since: when each of the broken ones was asked for.
    """

    url: str
    outcomes: Counter[str] = field(default_factory=Counter)
    broken_since: list[float] = field(default_factory=list)
    is_over: bool = False
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self.threads = [threading.Thread(target=self.ask, args=(index,)) for index in range(NUM_CLIENTS)]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        self.is_over = True
        for thread in self.threads:
            thread.join()

    def ask(self, index: int) -> None:
        with httpx.Client(timeout=60) as client:
            count = 0
            while not self.is_over:
                count += 1
                body = {"model": NAME, "prompt": f"{index} {count}", "max_tokens": LONG, "stream": bool(count % 2)}
                since = time.monotonic()
                outcome = _outcome(client.post(f"{self.url}/v1/completions", json=body))
                self.outcomes[outcome] += 1
                if outcome == "broken":
                    self.broken_since.append(since)
                time.sleep(PAUSE_S)


def _outcome(answer: httpx.Response) -> str:
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    if answer.headers["content-type"].startswith("application/json"):
        return "answered"
    if '"error"' in answer.text:
        return "broken"
    return "answered" if "[DONE]" in answer.text else "cut"


@contextlib.contextmanager
def under_load(url: str) -> Iterator[Load]:
    load = Load(url)
    load.start()
    try:
        yield load
    finally:
        load.end()


def answered_by(url: str, server: TritonServer) -> float:
    text = httpx.get(f"{url}/metrics").text
    head = f'gateway_backend_requests_total{{backend="{server.grpc_url}",model="{NAME}",outcome="answered"}} '
    return float(next((line.removeprefix(head) for line in text.splitlines() if line.startswith(head)), 0))


def wait_for_answers(url: str, *servers: TritonServer) -> None:
    """Until each of the servers has answered more."""
    before = [answered_by(url, server) for server in servers]
    wait(lambda: all(answered_by(url, server) >= old + 3 for server, old in zip(servers, before, strict=True)))


def wait_until_idle(url: str, server: TritonServer) -> None:
    """Until the gateway sends nothing there any more, and what was there has ended."""

    def says(state: str, value: float) -> bool:
        return f'gateway_backend_{state}{{backend="{server.grpc_url}"}} {value}' in httpx.get(f"{url}/metrics").text

    wait(lambda: says("drained", 1.0))
    wait(lambda: says("live", 0.0))


def test_a_drained_upgrade_loses_no_request(pair: tuple[TritonServer, ...], tmp_path: Path) -> None:
    old, other = pair
    drained = tmp_path / "drained"
    urls = (old.grpc_url, other.grpc_url)
    with gateway(backend_urls=urls, models=(NAME,), drained=str(drained)) as url, under_load(url) as load:
        wait_for_answers(url, old, other)
        drained.write_text(old.grpc_url, encoding="utf-8")
        wait_until_idle(url, old)
        old.stop()  # SIGTERM
        wait_for_answers(url, other)
        old.start()  # the new one, at the address of the old
        drained.unlink()
        wait_for_answers(url, old, other)
    assert set(load.outcomes) == {"answered"}, load.outcomes


def test_a_rolling_upgrade_behind_one_name_loses_no_request(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Kubernetes: the new pod is ready, the old one's address leaves DNS, it runs empty, and SIGTERM comes."""
    there = ["127.0.0.1"]

    async def resolve(host: str, port: int) -> list[str]:
        return list(there)

    monkeypatch.setattr(addresses, "resolve", resolve)
    old = _server(repository, tmp_path / "old.log")
    with old:
        port = int(old.grpc_url.rpartition(":")[2])
        settings: dict[str, Any] = {"backend_urls": (f"dns:r1-triton:{port}",), "models": (NAME,)}
        with gateway(**settings, probe_interval_s=0.2) as url, under_load(url) as load:
            wait_for_answers(url, old)
            new = TritonServer(
                repository, host="127.0.0.2", http_port=0, grpc_port=port, metrics_port=0,
                log_file=tmp_path / "new.log",
            )  # fmt: skip
            with new:
                there.append("127.0.0.2")
                wait_for_answers(url, old, new)
                there.remove("127.0.0.1")
                wait(lambda: f'backend_live{{backend="{old.grpc_url}"}}' not in httpx.get(f"{url}/metrics").text)
                old.stop()  # SIGTERM
                wait_for_answers(url, new)
                load.end()
                end_at_once(new)
    assert set(load.outcomes) == {"answered"}, load.outcomes


def test_a_server_that_is_killed_breaks_what_has_begun_on_it_alone(pair: tuple[TritonServer, ...]) -> None:
    victim, other = pair
    with gateway(backend_urls=(victim.grpc_url, other.grpc_url), models=(NAME,)) as url, under_load(url) as load:
        wait_for_answers(url, victim, other)
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for_answers(url, other)
        victim.stop()
        victim.start()
        wait_for_answers(url, victim, other)
    assert set(load.outcomes) <= {"answered", "broken"}, load.outcomes
    assert load.outcomes["broken"] <= NUM_CLIENTS, "one for each client"
    assert all(since < killed for since in load.broken_since), "streams that had begun there, and nothing later"
