"""Servers that come and go: each address that DNS has for a name is one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from deepseek_triton.gateway.backend import addresses
from deepseek_triton.gateway.backend.addresses import addresses_of
from deepseek_triton.gateway.backend.routing import build
from deepseek_triton.gateway.settings import GatewaySettings
from tests.support.gateway import gateway
from tests.support.gateway_servers import FakeServer

FAST: dict[str, Any] = {"probe_interval_s": 0.05, "probe_timeout_s": 2.0, "affinity_bytes": 0}
BODY = {"model": "r1", "messages": [{"role": "user", "content": "Hello"}]}


class Zone:
    """DNS of one name, and a fake server at each address that was ever there."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.is_silent = False
        self.is_broken = False
        self.unmade: set[str] = set()
        self.servers: dict[str, FakeServer] = {}

    async def resolve(self, host: str, port: int) -> list[str]:
        if self.is_silent:
            raise OSError("no answer")
        if self.is_broken:
            raise RuntimeError("what nobody expects")
        assert (host, port) == ("r1-triton", 8001)
        return self.addresses

    def make(self, url: str, *_: object) -> FakeServer:
        if url in self.unmade:
            raise RuntimeError("what nobody expects")
        return self.servers.setdefault(url, FakeServer(pause_s=0.02))


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, zone: Zone) -> Iterator[str]:
    monkeypatch.setattr(addresses, "resolve", zone.resolve)
    monkeypatch.setattr(build, "TritonBackend", zone.make)
    with gateway(backend_urls=("dns:r1-triton:8001",), **FAST) as url:
        yield url


def ask(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=BODY | fields, timeout=30)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def up(url: str) -> set[str]:
    """The servers that `/metrics` says answer."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {line.split('"')[1] for line in lines if line.startswith("gateway_backend_up{") and line.endswith(" 1.0")}


def test_addresses_become_servers_and_servers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone()
    with served(monkeypatch, zone) as url:
        assert ask(url).status_code == 503, "there is none yet"
        zone.addresses = ["10.0.0.1", "10.0.0.2", "fd00::3"]
        until(lambda: up(url) == {"10.0.0.1:8001", "10.0.0.2:8001", "[fd00::3]:8001"})
        until(lambda: ask(url).status_code == 200 and all(server.requests for server in zone.servers.values()))
        zone.addresses = ["10.0.0.2"]
        until(lambda: up(url) == {"10.0.0.2:8001"})
        gauges = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "10.0.0.1" in line]
        assert not [line for line in gauges if "_up{" in line or "_live{" in line or "_open{" in line]
        counts = {address: len(server.requests) for address, server in zone.servers.items()}
        assert all(ask(url).status_code == 200 for _ in range(5))
        assert len(zone.servers["10.0.0.2:8001"].requests) == counts["10.0.0.2:8001"] + 5
        zone.is_silent = True
        time.sleep(0.2)
        assert ask(url).status_code == 200, "DNS that doesn't answer takes nothing away"


@pytest.mark.parametrize("returns", [False, True])
def test_what_runs_on_a_server_that_goes_ends_there(monkeypatch: pytest.MonkeyPatch, returns: bool) -> None:
    zone = Zone()
    zone.addresses = ["10.0.0.1"]
    with served(monkeypatch, zone) as url:
        until(lambda: up(url) == {"10.0.0.1:8001"})
        old = zone.servers["10.0.0.1:8001"]
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY | {"stream": True}, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            old.is_hanging = True  # until all that comes has been seen
            zone.addresses = ["10.0.0.2"]
            until(lambda: "10.0.0.2:8001" in up(url))
            assert ask(url).status_code == 200
            assert len(old.requests) == 1, "it goes to the new one"
            if returns:
                zone.addresses = ["10.0.0.1", "10.0.0.2"]
                time.sleep(0.2)
            assert old.running == 1
            old.is_hanging = False
            assert "data: [DONE]" in list(lines)
        gone = {"10.0.0.1:8001", "10.0.0.2:8001"} if returns else {"10.0.0.2:8001"}
        until(lambda: up(url) == gone)


def test_errors_that_nobody_expects_end_no_search(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    zone = Zone()
    with served(monkeypatch, zone) as url:
        zone.is_broken = True
        until(lambda: "servers can't be looked for" in caplog.text)
        zone.unmade = {"10.0.0.1:8001"}
        zone.addresses, zone.is_broken = ["10.0.0.1", "10.0.0.2"], False
        until(lambda: up(url) == {"10.0.0.2:8001"})
        until(lambda: "the server at 10.0.0.1:8001 can't be added now" in caplog.text)
        zone.servers["10.0.0.2:8001"].probe_error = RuntimeError("what nobody expects")
        until(lambda: not up(url))
        zone.servers["10.0.0.2:8001"].probe_error = None
        zone.unmade = set()
        until(lambda: up(url) == {"10.0.0.1:8001", "10.0.0.2:8001"})


def test_a_name_and_plain_addresses_together() -> None:
    async def look_up(host: str, port: int) -> list[str]:
        return ["10.0.0.2", "10.0.0.1", "10.0.0.2"]

    found = asyncio.run(addresses_of(["a:8001", "dns:b:9", "a:8001", "10.0.0.1:9"], look_up))
    assert found == ("a:8001", "10.0.0.1:9", "10.0.0.2:9")


@pytest.mark.parametrize("url", ["dns:", "dns:a", "dns:a:", "dns:a:x", "dns::8001"])
def test_a_name_without_host_or_port_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be host:port, or dns:host:port"):
        GatewaySettings(backend_urls=(url,))


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example"])
def test_a_host_that_no_name_can_be_isnt_found(host: str) -> None:
    with pytest.raises(OSError, match="is no host's name"):
        asyncio.run(addresses.resolve(host, 8001))
