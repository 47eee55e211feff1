"""Show that no job is lost and none is stored twice while everything is killed with -9, again and again, at random.

A real tritonserver (whose runner takes a fixed time for each step), a real Redis with its append-only file, a gateway
and two workers; one of them is killed every few seconds, and started again after a moment, until all jobs have ended.
Jobs are submitted through the gateway with idempotency keys; a submission that fails is made again.
    python -m benchmarks.gateway.jobs_chaos [--jobs 10000] [--seed 0] [--every 5]
writes benchmarks/results/gateway-jobs.json; the status is 1 if a job was lost or stored twice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis

from benchmarks.machine import describe
from benchmarks.streaming import NAME, ROOT, write_repository
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.free_ports import free_ports
from deepseek_triton.gateway.jobs.queue import PREFIX

RESULTS = ROOT / "benchmarks" / "results"
NUM_TOKENS = 4
STEP_S = 0.005
SUBMITTERS = 16
LEASE_S = 5
ATTEMPTS = 20  # as many as a job may have; a kill counts as one
LONGEST_PAUSE_S = 2.0  # between a kill and the next start
STALLED_S = 180.0  # without one job that ends: given up


@dataclass
class Victim:
    """Something that is killed and started again."""

    name: str
    kill: Callable[[], None]
    start: Callable[[], None]


class Command:
    """A process that is one of several equal ones: started, killed with -9, started again."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._words, self._log = words, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it isn't waited for."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill it with -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class Cluster:
    """Everything that runs. peak_bytes: the most memory that Redis used."""

    gateway_url: str
    redis_port: int
    victims: tuple[Victim, ...]
    kills: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0

    def redis(self) -> redis.Redis:
        """A new connection."""
        return redis.Redis(port=self.redis_port, decode_responses=True, socket_timeout=5)

    async def harm(self, every_s: float, chance: random.Random) -> None:
        """Kill one after the other, each started again before the next is killed."""
        while True:
            await asyncio.sleep(chance.uniform(0.5, 1.5) * every_s)
            victim = chance.choice(self.victims)
            await asyncio.to_thread(victim.kill)
            self.kills[victim.name] += 1
            await asyncio.sleep(chance.uniform(0, LONGEST_PAUSE_S))
            await asyncio.to_thread(victim.start)

    async def submit(self, numbers: Sequence[int]) -> list[str]:
        """Submit every job until it is taken; returns their ids in order."""
        ids: dict[int, str] = {}
        left = iter(numbers)

        async def work() -> None:
            async with httpx.AsyncClient(base_url=self.gateway_url, timeout=10) as client:
                for number in left:
                    body = {"model": NAME, "prompt": f"One {number}", "max_tokens": NUM_TOKENS}
                    job = {"endpoint": "/v1/completions", "body": body, "max_attempts": ATTEMPTS}
                    while number not in ids:
                        with contextlib.suppress(httpx.HTTPError):
                            answer = await client.post(
                                "/v1/jobs", json=job, headers={"idempotency-key": f"job-{number}"}
                            )
                            if answer.is_success:
                                ids[number] = answer.json()["id"]
                                break
                            if answer.status_code not in (429, 500, 502, 503):
                                raise RuntimeError(f"a job was refused: {answer.text}")
                        await asyncio.sleep(0.1)

        await asyncio.gather(*(work() for _ in range(SUBMITTERS)))
        return [ids[number] for number in numbers]

    async def wait(self, num_jobs: int) -> None:
        """Until so many jobs have ended, or none has for a long time."""
        last, since = -1, time.monotonic()
        while last < num_jobs and time.monotonic() - since < STALLED_S:
            with contextlib.suppress(redis.RedisError, OSError):
                ended = await asyncio.to_thread(self._count_ended)
                if ended != last:
                    last, since = ended, time.monotonic()
                    print(f"{ended} of {num_jobs} have ended; killed: {dict(self.kills)}", file=sys.stderr, flush=True)
            await asyncio.sleep(1)

    def _count_ended(self) -> int:
        with self.redis() as store:
            self.peak_bytes = max(self.peak_bytes, int(store.info("memory")["used_memory"]))
            waiting = sum(
                store.zcard(f"{PREFIX}{name}") for name in ("waiting:0", "waiting:1", "waiting:2", "waiting:3")
            )
            waiting += store.zcard(f"{PREFIX}later") + store.zcard(f"{PREFIX}running")
            return int(store.hlen(f"{PREFIX}sizes")) - int(waiting)

    def judge(self, ids: Sequence[str]) -> dict[str, int]:
        """What became of the jobs."""
        lost = twice = repeated = failed = 0
        with self.redis() as store:
            for job_id in ids:
                status, response, attempts = store.hmget(f"{PREFIX}job:{job_id}", "status", "response", "attempts")
                ends = [
                    entry["event"]
                    for _, entry in store.xrange(f"{PREFIX}events:{job_id}")
                    if entry["event"] not in ("queued", "running", "chunk")
                ]
                is_answered = status == "completed" and json.loads(response)["status_code"] == 200
                lost += status is None or not ends
                failed += status is not None and not is_answered
                twice += len(ends) > 1
                repeated += int(attempts or 1) - 1
        return {
            "jobs": len(ids),
            "ids": len(set(ids)),
            "lost": lost,
            "failed": failed,
            "stored_twice": twice,
            "repeated_executions": repeated,
        }


def run(num_jobs: int, every_s: float, seed: int) -> dict[str, Any]:
    """All of it: the figures."""
    names = ("redis", "gateway", "http", "grpc", "metrics")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    with tempfile.TemporaryDirectory() as text, contextlib.ExitStack() as stack:
        directory = Path(text)
        write_repository(directory / "models", 64, STEP_S)
        triton = TritonServer(
            directory / "models", http_port=ports["http"], grpc_port=ports["grpc"], metrics_port=ports["metrics"]
        )
        server = shutil.which("redis-server")
        if server is None:
            raise SystemExit("error: redis-server isn't installed (Debian: redis-server)")
        store = Command(
            [server, "--port", str(ports["redis"]), "--bind", "127.0.0.1", "--save", "", "--dir", text,
             "--appendonly", "yes"],
            directory / "redis.log",
        )  # fmt: skip
        shared = ["--redis-url", f"redis://127.0.0.1:{ports['redis']}/0", "--model", NAME]
        shared += ["--backend-url", f"127.0.0.1:{ports['grpc']}", "--job-lease-s", str(LEASE_S)]
        shared += ["--max-jobs-waiting", str(num_jobs + 1), "--job-attempts", str(ATTEMPTS)]
        command = [sys.executable, "-m", "deepseek_triton.gateway"]
        gateway = Command(
            [*command, "serve", "--port", str(ports["gateway"]), "--job-concurrency", "0", *shared],
            directory / "gateway.log",
        )
        workers = [
            Command([*command, "worker", "--job-concurrency", "16", *shared], directory / f"worker-{number}.log")
            for number in range(2)
        ]
        victims = [Victim("Triton", lambda: _kill_server(triton), triton.restart)]
        victims += [Victim("Redis", store.kill, store.start), Victim("gateway", gateway.kill, gateway.start)]
        victims += [Victim("worker", worker.kill, worker.start) for worker in workers]
        stack.callback(triton.stop)
        triton.start()
        for victim in victims[1:]:
            stack.callback(victim.kill)
            victim.start()
        cluster = Cluster(f"http://127.0.0.1:{ports['gateway']}", ports["redis"], tuple(victims))
        began = time.monotonic()
        ids = asyncio.run(_under_harm(cluster, num_jobs, every_s, random.Random(seed)))
        seconds = time.monotonic() - began
        figures = {**cluster.judge(ids), "seconds": seconds, "kills": dict(cluster.kills)}
        with cluster.redis() as connection:
            end = int(connection.info("memory")["used_memory"])
        return {**figures, "redis_peak_mib": cluster.peak_bytes / 2**20, "redis_end_mib": end / 2**20, "seed": seed}


async def _under_harm(cluster: Cluster, num_jobs: int, every_s: float, chance: random.Random) -> list[str]:
    harm = asyncio.create_task(cluster.harm(every_s, chance))
    waiting = asyncio.create_task(cluster.wait(num_jobs))
    try:
        ids = await cluster.submit(range(num_jobs))
        await waiting
    finally:
        waiting.cancel()
        harm.cancel()
        await asyncio.gather(harm, return_exceptions=True)
    for victim in cluster.victims:  # the one that was dead when the last job ended
        if victim.name == "Redis":
            victim.kill()
            victim.start()
    await cluster.wait(num_jobs)
    return ids


def _kill_server(triton: TritonServer) -> None:

    with contextlib.suppress(ProcessLookupError):
        os.kill(triton.pid, signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write and judge."""
    parser = argparse.ArgumentParser(description="jobs while everything is killed")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two kills (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    figures = run(options.jobs, options.every, options.seed)
    row = {**figures, "machine": describe()}
    (RESULTS / "gateway-jobs.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
    wrong = [name for name in ("lost", "failed", "stored_twice") if figures[name]]
    wrong += ["ids"] if figures["ids"] != options.jobs else []
    for name in wrong:
        print(f"WRONG: {name} is {figures[name]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
