"""Measure what clients see when servers fail: an open breaker, twice the capacity, a server killed again and again.

tritonserver serves a runner that takes a fixed time for each step and computes nothing.
    python -m benchmarks.gateway.resilience [--requests 2000] [--seconds 60]
writes benchmarks/results/gateway-resilience.json; the status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.gateway.failing_server import failing_server
from benchmarks.gateway.process import RunningGateway, gateway_process
from benchmarks.machine import describe
from benchmarks.streaming import NAME, ROOT, write_repository
from deepseek_triton.ensemble.server.tritonserver import TritonServer

RESULTS = ROOT / "benchmarks" / "results"
CAPACITY = 8
STEP_S = 0.02
NUM_TOKENS = 50
KILL_EACH_S = 10.0
MAX_REFUSAL_MS = 5.0
MAX_SLOWDOWN = 1.2  # of admitted requests at twice the capacity
RETRY_S = 0.1  # a refused client's pause: one that asks again at once measures only itself


@dataclass(frozen=True)
class Ending:
    """How one request ended: status, seconds, and whether an answer that had begun broke off."""

    status: int
    seconds: float
    is_broken: bool


async def ask(url: str, *, is_streamed: bool) -> Ending:
    """One completion over a connection of its own."""
    address = urlsplit(url)
    body = json.dumps({"model": NAME, "prompt": "One", "max_tokens": NUM_TOKENS, "stream": is_streamed}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    start = time.perf_counter()
    try:
        writer.write(head.encode() + body)
        text = await reader.read(-1)
    finally:
        writer.close()
    status = int(text.split(b" ", 2)[1]) if text.startswith(b"HTTP/1.1 ") else 0
    is_broken = status == 200 and (b'"error"' in text or (is_streamed and b"[DONE]" not in text))
    return Ending(status, time.perf_counter() - start, is_broken)


async def keep_asking(url: str, num_clients: int, seconds: float) -> list[Ending]:
    """So many clients, for so long; every other request is streamed."""
    endings: list[Ending] = []
    end = time.monotonic() + seconds

    async def client() -> None:
        count = 0
        while time.monotonic() < end:
            count += 1
            ending = await ask(url, is_streamed=bool(count % 2))
            endings.append(ending)
            if ending.status in (429, 503):
                await asyncio.sleep(RETRY_S)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return endings


def open_breaker(num_requests: int) -> dict[str, float]:
    """Milliseconds in which requests are refused, one after another."""

    async def measure(url: str) -> list[Ending]:
        for _ in range(5):
            await ask(url, is_streamed=False)
        return [await ask(url, is_streamed=bool(index % 2)) for index in range(num_requests)]

    options = ("--model", NAME, "--breaker-open-s", "3600", "--log-level", "error")
    with failing_server() as backend, gateway_process("--backend-url", backend, *options) as gateway:
        endings = asyncio.run(measure(gateway.url))
    if {ending.status for ending in endings} != {503}:
        raise RuntimeError(f"the breaker isn't open: {Counter(ending.status for ending in endings)}")
    return _times(endings)


def twice_the_capacity(gateway: RunningGateway, seconds: float) -> dict[str, Any]:
    """Times of whole answers and of refusals, with as many clients as fit, and with twice as many."""
    rows: dict[str, Any] = {}
    for name, num_clients in (("capacity", CAPACITY), ("twice", 2 * CAPACITY)):
        endings = asyncio.run(keep_asking(gateway.url, num_clients, seconds))
        answered = [ending for ending in endings if ending.status == 200 and not ending.is_broken]
        refused = [ending for ending in endings if ending.status in (429, 503)]
        rows[name] = {
            "clients": num_clients, "answered": len(answered), "answered_per_s": len(answered) / seconds,
            "refused": len(refused), "others": len(endings) - len(answered) - len(refused), **_times(answered),
        }  # fmt: skip
        if len(refused) > 1:
            rows[name]["refusals"] = _times(refused)
    return rows


def killed_again_and_again(gateway: RunningGateway, servers: Sequence[TritonServer], seconds: float) -> dict[str, int]:
    """Requests by how they ended, while one of the servers in turn is killed each ten seconds, and started again."""

    async def run() -> tuple[list[Ending], int]:
        load = asyncio.create_task(keep_asking(gateway.url, CAPACITY, seconds))
        num_kills, loop = 0, asyncio.get_running_loop()
        while not load.done():
            await asyncio.wait({load}, timeout=KILL_EACH_S)
            if load.done():
                break
            server = servers[num_kills % len(servers)]
            os.kill(server.pid, signal.SIGKILL)
            num_kills += 1
            await loop.run_in_executor(None, _start_again, server)
        return await load, num_kills

    endings, num_kills = asyncio.run(run())
    counts = Counter("broken" if ending.is_broken else str(ending.status) for ending in endings)
    return {"kills": num_kills, "requests": len(endings), **counts}


def _start_again(server: TritonServer) -> None:
    server.stop()
    server.start()


def _times(endings: Sequence[Ending]) -> dict[str, float]:
    values = [ending.seconds * 1e3 for ending in endings]
    return {"median_ms": statistics.median(values), "p99_ms": statistics.quantiles(values, n=100)[98]}


def missed(figures: Any) -> list[str]:
    """The targets that `figures` miss."""
    faults = []
    if figures["open_breaker"]["p99_ms"] > MAX_REFUSAL_MS:
        faults.append(
            f"an open breaker refuses in {figures['open_breaker']['p99_ms']:.1f} ms, {MAX_REFUSAL_MS} at most"
        )
    one, two = figures["load"]["capacity"], figures["load"]["twice"]
    if two["p99_ms"] > MAX_SLOWDOWN * one["p99_ms"] or two["others"]:
        faults.append(f"at twice the capacity answers take {two['p99_ms']:.0f} ms, {one['p99_ms']:.0f} at capacity")
    killed = figures["killed"]
    if killed.get("broken", 0) > killed["kills"] * CAPACITY or set(killed) - {"kills", "requests", "200", "broken"}:
        faults.append(f"more than what had begun on a killed server failed: {killed}")
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=2000, help="requests that an open breaker refuses")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    options = parser.parse_args(argv)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    figures: dict[str, Any] = {"machine": describe(), "step_ms": STEP_S * 1e3, "tokens": NUM_TOKENS}
    figures["open_breaker"] = open_breaker(options.requests)
    with contextlib.ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "models"
        write_repository(repository, CAPACITY, STEP_S)
        ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        servers = [stack.enter_context(TritonServer(repository, **ports)) for _ in range(2)]
        common = ("--model", NAME, "--log-level", "error")
        with gateway_process("--backend-url", servers[0].grpc_url, "--capacity", str(CAPACITY), *common) as gateway:
            figures["load"] = twice_the_capacity(gateway, options.seconds)
        urls = [word for server in servers for word in ("--backend-url", server.grpc_url)]
        with gateway_process(*urls, *common) as gateway:
            figures["killed"] = killed_again_and_again(gateway, servers, options.seconds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gateway-resilience.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    faults = missed(figures)
    for fault in faults:
        print(f"missed: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
