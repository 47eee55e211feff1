"""Several worker processes, as the command starts them: one key's limits hold for all, and SIGTERM ends all."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from benchmarks.gateway.process import RunningGateway, gateway_process
from tests.support.redis import needs_redis, redis_server

# Nothing listens there: what the limits let through is answered with 503.
NOWHERE = ("--backend-url", "127.0.0.1:1", "--model", "x")


def statuses(gateway: RunningGateway, count: int) -> Counter[tuple[int, bool]]:
    """Statuses, and whether limits were told, of requests on a connection of each its own."""
    found: Counter[tuple[int, bool]] = Counter()
    for _ in range(count):
        answer = httpx.get(f"{gateway.url}/v1/models", timeout=60)
        found[answer.status_code, "x-ratelimit-limit-requests" in answer.headers] += 1
    return found


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


@pytest.mark.slow
@needs_redis
def test_workers_share_limits_and_end_together() -> None:
    with (
        redis_server() as redis,
        gateway_process(*NOWHERE, "--workers", "2", "--redis-url", redis, "--requests-per-minute", "6") as gateway,
    ):
        found = statuses(gateway, 16)
        assert found[503, True] in (6, 7)  # 7: a minute's end lies between
        assert found[429, True] == 16 - found[503, True]
        workers = children(gateway.process.pid)
        assert len(workers) >= 2
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(20)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
