"""JobWorker: takes jobs, runs them, renews their leases, and stores their results. A process has one at most."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from deepseek_triton.gateway.jobs.ending import end_tasks
from deepseek_triton.gateway.jobs.execution import Answer, answer
from deepseek_triton.gateway.jobs.job import QueueError
from deepseek_triton.gateway.jobs.queue import JobQueue, Taken
from deepseek_triton.gateway.observe.metrics import GatewayMetrics
from deepseek_triton.gateway.record import TokenUsage

log = logging.getLogger(__name__)

BEAT_S = 0.4  # between two renewals: a job that is cancelled ends within this time
IDLE_S = 1.0
PAUSE_S = 0.5  # after an error, and while no model is there
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
BUSY_S, LONGEST_BUSY_S = 1.0, 30.0  # until what a full server refuses, or an open breaker, is asked again
GIVE_UP_S = 60.0  # after which a result that Redis doesn't take is left to whoever runs the job again
EMIT_S = 0.1  # events of a stream travel together
# What says that the server is full and did nothing: the job waits, and the attempt doesn't count.
BUSY_CODES = frozenset(("server_overloaded", "too_many_running", "rate_limit_exceeded", "draining"))

Charge = Callable[[str, int, int], Awaitable[None]]  # caller, its tokens a minute, tokens that it has used


@dataclass(frozen=True)
class Work:
    """What a worker needs of the gateway. app: answers requests. charge: counts tokens on somebody's account."""

    app: ASGIApp
    is_ready: Callable[[], Awaitable[bool]]
    charge: Charge
    metrics: GatewayMetrics


class JobWorker:
    """Runs at most `concurrency` jobs at one time."""

    def __init__(self, queue: JobQueue, work: Work, concurrency: int) -> None:
        self._queue, self._work, self._concurrency = queue, work, concurrency
        self._running: dict[str, tuple[Taken, asyncio.Task[None]]] = {}
        self._closing: set[str] = set()  # leases of jobs that are computed no more
        self._is_stopping = False
        self._loops: list[asyncio.Task[None]] = []
        self._slot_is_free = asyncio.Event()
        self._asked_at, self._is_ready = float("-inf"), False

    def start(self) -> None:
        """Begin to take jobs."""
        self._loops = [asyncio.create_task(self._repeat(self._take)), asyncio.create_task(self._repeat(self._beat))]

    def drain(self) -> None:
        """Take no more, and give back what runs; it returns at once."""
        self._is_stopping = True
        for lease in list(self._running):
            self._cancel(lease)

    async def stop(self) -> None:
        """Drain, and wait until everything has been given back."""
        self.drain()
        await end_tasks(self._loops)
        if running := [task for _, task in self._running.values()]:
            await asyncio.wait(running)

    async def _repeat(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await step()
            except QueueError as error:
                log.warning("%s", error)
                await asyncio.sleep(PAUSE_S)
            except Exception:
                log.exception("a step of the queue failed")
                await asyncio.sleep(PAUSE_S)

    async def _take(self) -> None:
        if self._is_stopping:
            await asyncio.sleep(PAUSE_S)
            return
        num_free = self._concurrency - len(self._running)
        if num_free <= 0:
            self._slot_is_free.clear()
            await self._slot_is_free.wait()
            return
        if not await self._is_server_ready():
            await asyncio.sleep(PAUSE_S)
            return
        taken = await self._queue.take(num_free)
        for one in taken:
            task = asyncio.create_task(self._run(one))
            self._running[one.lease] = one, task
            task.add_done_callback(partial(self._forget, one.lease))
            if self._is_stopping:
                self._cancel(one.lease)
        if not taken:
            await self._queue.wait(IDLE_S)

    async def _is_server_ready(self) -> bool:
        """Asked once a second at most: a job isn't begun while nothing can answer it."""
        now = asyncio.get_running_loop().time()
        if now - self._asked_at > IDLE_S or not self._is_ready:
            self._is_ready = await self._work.is_ready()
            self._asked_at = now
        return self._is_ready

    def _forget(self, lease: str, _: asyncio.Task[None]) -> None:
        self._running.pop(lease, None)
        self._closing.discard(lease)
        self._slot_is_free.set()

    async def _beat(self) -> None:
        await asyncio.sleep(BEAT_S)
        running = [one for one, _ in self._running.values()]
        lost = await self._queue.renew(running)
        for one in running:
            if one.job.id in lost:
                self._cancel(one.lease)

    def _cancel(self, lease: str) -> None:
        """End a job that is being computed, once; a result that is being stored is stored."""
        if lease in self._running and lease not in self._closing:
            self._closing.add(lease)
            self._running[lease][1].cancel()

    async def _run(self, taken: Taken) -> None:
        job = taken.job
        try:
            emitter = _Emitter(self._queue, taken)
            is_streamed = bool(json.loads(job.body).get("stream"))
            async with emitter.running() if is_streamed else contextlib.nullcontext():
                got = await answer(
                    self._work.app,
                    job.endpoint,
                    job.body,
                    request_id=f"{job.id}-{job.attempts}",
                    owner=job.owner,
                    caller=job.caller,
                    on_chunk=emitter.add if is_streamed else None,
                )
        except asyncio.CancelledError:
            # Its lease is lost, or this process stops: then the lease still holds, and the job goes back.
            await self._store(lambda: self._queue.give_back(taken))
            return
        except Exception:
            log.exception("the job %s failed within the gateway", job.id)
            got = Answer(500, '{"error":{"code":"internal_error"}}', TokenUsage())
        self._closing.add(taken.lease)
        await self._settle(taken, got)

    async def _settle(self, taken: Taken, got: Answer) -> None:
        job = taken.job
        response = f'{{"status_code":{got.status},"request_id":"{job.id}-{job.attempts}","body":{got.body}}}'
        if got.status < 400:
            is_stored = await self._store(lambda: self._queue.finish(taken, "completed", response))
            outcome = "completed"
        elif got.status in (429, 503) and (got.code in BUSY_CODES or got.is_unsent):
            busy_s = min(max(got.retry_after_s, BUSY_S), LONGEST_BUSY_S) * (1 + random.random())
            is_stored = await self._store(lambda: self._queue.give_back(taken, busy_s))
            outcome = "busy"
        elif got.status < 500:
            is_stored = await self._store(lambda: self._queue.finish(taken, "failed", response))
            outcome = "failed"
        else:
            delay_s = min(FIRST_RETRY_S * 2 ** (job.attempts - 1), LONGEST_RETRY_S) * (1 + random.random() / 2)
            is_stored = await self._store(lambda: self._queue.retry(taken, delay_s, response, ""))
            outcome = "retried" if job.attempts < job.max_attempts else "dead"
        metrics = self._work.metrics
        metrics.job_attempts.labels(outcome if is_stored else "lease_lost").inc()
        num_tokens = got.usage.input + got.usage.output
        if num_tokens and job.tokens_per_minute:
            await self._work.charge(job.caller, job.tokens_per_minute, num_tokens)

    async def _store(self, store: Callable[[], Awaitable[bool]]) -> bool:
        """Tell Redis, again and again while it doesn't answer: it may be starting."""
        end = asyncio.get_running_loop().time() + (FIRST_RETRY_S if self._is_stopping else GIVE_UP_S)
        while True:
            try:
                return await store()
            except QueueError as error:
                if asyncio.get_running_loop().time() > end:
                    log.error("a job is left to the end of its lease: %s", error)
                    return False
                await asyncio.sleep(PAUSE_S)


class _Emitter:
    """Adds the events of a stream to a job's, those of a tenth of a second together."""

    def __init__(self, queue: JobQueue, taken: Taken) -> None:
        self._queue, self._taken = queue, taken
        self._chunks: list[str] = []
        self._num_emitted = 0

    async def add(self, chunk: str) -> None:
        self._chunks.append(chunk)

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        task = asyncio.create_task(self._repeat())
        try:
            yield
            await self._flush()
        finally:
            await end_tasks((task,))

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(EMIT_S)
            await self._flush()

    async def _flush(self) -> None:
        """What Redis doesn't take is missing in the events; the result has all."""
        chunks, self._chunks = self._chunks, []
        first, self._num_emitted = self._num_emitted, self._num_emitted + len(chunks)
        if chunks:
            try:
                await self._queue.emit(self._taken, first, chunks)
            except QueueError as error:
                log.warning("events are lost: %s", error)
