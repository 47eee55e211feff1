"""JobQueue: jobs in Redis. At least once executed, exactly one result stored.

A job that is taken has a lease, which its worker renews; when the lease ends, another takes the job. What a worker
stores counts only while its lease holds. It knows nothing of HTTP and of what a job computes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from redis.asyncio import Redis

from deepseek_triton.gateway.jobs import scripts
from deepseek_triton.gateway.jobs.job import PRIORITIES, JobsFullError, KeyReusedError, NewJob, QueuedJob, QueueError
from deepseek_triton.gateway.protection.redis_pool import ERRORS, connection_pool

PREFIX = "deepseek-gateway:jobs:"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Taken:
    """A job to run. lease: proves that it is still this process's."""

    job: QueuedJob
    lease: str


@dataclass(frozen=True)
class JobEvent:
    """What became of a job. id: grows with each. kind: a status or "chunk"; data: JSON."""

    id: str
    kind: str
    data: str


@dataclass(frozen=True)
class QueueStats:
    """waiting: jobs of each priority; those that are tried again are `later`. num_bytes: of all that is kept."""

    waiting: Mapping[str, int]
    later: int
    running: int
    dead: int
    num_bytes: int
    oldest_s: float


@dataclass(frozen=True)
class QueueLimits:
    """max_waiting: jobs. max_bytes: of jobs and results together. keep_s: how long a job's result is kept."""

    max_waiting: int = 10_000
    max_bytes: int = 1 << 30
    keep_s: float = 86400.0
    lease_s: float = 15.0


class JobQueue:
    """The queue in the Redis at `url`. Every method but `close` raises `QueueError` where Redis doesn't answer."""

    def __init__(self, url: str, limits: QueueLimits) -> None:
        self.limits = limits
        # Every script may be said twice: the second time finds what the first has done.
        self._pool = connection_pool(url, num_retries=1)
        self.redis = Redis(connection_pool=self._pool)
        self._scripts: dict[str, Any] = {}
        self._process = secrets.token_hex(8)

    async def close(self) -> None:
        """Release the connections."""
        await self._pool.disconnect()

    async def run(self, steps: str, *values: str | bytes | float, more: str = "") -> Any:
        """Run a script of `scripts`; `more`: functions that it needs beside the common ones."""
        if steps not in self._scripts:
            self._scripts[steps] = self.redis.register_script(scripts.script(steps, more))
        return await self.ask(self._scripts[steps](keys=(PREFIX,), args=values))

    async def ask(self, answer: Awaitable[Result]) -> Result:
        """What Redis answers."""
        try:
            return await answer
        except ERRORS as error:
            raise QueueError(f"the queue's Redis doesn't answer: {error}") from error

    async def submit(self, new: NewJob) -> QueuedJob:
        """Keep a job, or find the one that its idempotency key has made.

        Raises `JobsFullError`, and `KeyReusedError` for a key that came with another request.
        """
        fields: dict[str, str] = {
            "owner": new.owner,
            "endpoint": new.endpoint,
            "body": new.body,
            "max_attempts": str(new.max_attempts),
            "caller": new.caller,
            "tokens_per_minute": str(new.tokens_per_minute),
        }
        if new.webhook is not None:
            fields["webhook"] = json.dumps(dict(new.webhook))
        idempotency = f"{new.owner}:{_digest(new.idempotency_key)}" if new.idempotency_key else ""
        mark = _digest(json.dumps([new.endpoint, new.body, new.priority, fields.get("webhook")]))
        outcome, found = await self.run(
            scripts.SUBMIT,
            f"job_{secrets.token_hex(16)}",
            idempotency,
            mark,
            self.limits.max_waiting,
            self.limits.max_bytes,
            int(new.ttl_s * 1000),
            int(self.limits.keep_s * 1000),
            PRIORITIES.index(new.priority),
            *(part for item in fields.items() for part in item),
        )
        if outcome == b"full":
            what = "jobs wait" if found == b"jobs" else "bytes are kept"
            raise JobsFullError(f"the queue is full: as many {what} as may; retry later")
        if outcome == b"differs":
            raise KeyReusedError("this idempotency key came with another request before")
        job = await self.find(found.decode(), new.owner)
        if job is None:
            raise QueueError("the queue has lost a job")
        return job

    async def find(self, job_id: str, owner: str) -> QueuedJob | None:
        """The job, if it is there, of this owner. A batch's line is none."""
        fields = await self.ask(cast(Awaitable[dict[bytes, bytes]], self.redis.hgetall(f"{PREFIX}job:{job_id}")))
        if not fields or b"batch" in fields or fields[b"owner"].decode() != owner:
            return None
        return QueuedJob.from_hash(job_id, fields)

    async def take(self, count: int) -> list[Taken]:
        """At most `count` jobs that are this process's now: the most urgent, and of those the oldest."""
        token = f"{self._process}-{secrets.token_hex(4)}"
        rows = await self.run(scripts.TAKE, token, int(self.limits.lease_s * 1000), count)
        return [
            Taken(QueuedJob.from_hash(job_id.decode(), _pairs(fields)), lease.decode())
            for job_id, lease, fields in rows
        ]

    async def wait(self, timeout_s: float) -> None:
        """Wait until a job may have come, `timeout_s` (at most 1) at the longest."""
        await self.ask(cast(Awaitable[Any], self.redis.blpop([f"{PREFIX}bell"], timeout=timeout_s)))

    async def renew(self, taken: Iterable[Taken]) -> set[str]:
        """Renew the leases; the ids of the jobs whose lease is lost: cancelled, expired, or another worker's."""
        pairs = [part for one in taken for part in (one.job.id, one.lease)]
        lost = await self.run(scripts.RENEW, int(self.limits.lease_s * 1000), *pairs) if pairs else []
        return {job_id.decode() for job_id in lost}

    async def finish(self, taken: Taken, status: str, response: str, fault: str = "") -> bool:
        """Store the one result: JSON of the answer and of the error. False: the lease is lost, and nothing stored."""
        return bool(await self.run(scripts.FINISH, taken.job.id, taken.lease, status, response, fault))

    async def retry(self, taken: Taken, delay_s: float, response: str, fault: str) -> bool:
        """Try it again after `delay_s`; without attempts left it has failed, with this answer, and is a dead letter."""
        values = (taken.job.id, taken.lease, int(delay_s * 1000), "1", response, fault)
        return bool(await self.run(scripts.RETRY, *values))

    async def give_back(self, taken: Taken, delay_s: float = 0.0) -> bool:
        """Let another worker run it; this attempt doesn't count."""
        values = (taken.job.id, taken.lease, int(delay_s * 1000), "0", "", "")
        return bool(await self.run(scripts.RETRY, *values))

    async def cancel(self, job_id: str, owner: str) -> QueuedJob | None:
        """End a job; its worker learns it when it renews the lease. One that has ended stays as it is."""
        if not await self.run(scripts.CANCEL, job_id, owner):
            return None
        return await self.find(job_id, owner)

    async def emit(self, taken: Taken, first: int, chunks: Sequence[str]) -> bool:
        """Add parts of the answer to the job's events; `first`: how many came before them."""
        return bool(await self.run(scripts.EMIT, taken.job.id, taken.lease, first, *chunks))

    async def events(self, job_id: str, after: str, count: int = 256) -> list[JobEvent]:
        """The events after the one with the id `after`; "0": from the first that is kept."""
        rows = await self.ask(
            cast(Awaitable[Any], self.redis.xrange(f"{PREFIX}events:{job_id}", f"({after}", "+", count=count))
        )
        return [JobEvent(row_id.decode(), data[b"event"].decode(), data[b"data"].decode()) for row_id, data in rows]

    async def sweep(self) -> int:
        """End what has expired, and forget what has gone; how much it was."""
        return int(await self.run(scripts.SWEEP))

    async def stats(self) -> QueueStats:
        """The queue now."""
        *levels, later, running, dead, num_bytes, oldest_ms = await self.run(scripts.STATS)
        waiting = dict(zip(PRIORITIES, levels, strict=True))
        return QueueStats(waiting, later, running, dead, num_bytes, oldest_ms / 1000)

    async def take_hooks(self, count: int, lease_s: float) -> list[tuple[QueuedJob, int]]:
        """Jobs whose end is to be told now, and how often that was tried, this time counted."""
        rows = await self.run(scripts.TAKE_HOOKS, int(lease_s * 1000), count)
        return [(QueuedJob.from_hash(job_id.decode(), _pairs(fields)), int(tries)) for job_id, tries, fields in rows]

    async def note_hook(self, job_id: str, outcome: str, delay_s: float = 0.0) -> None:
        """Note that a webhook was "delivered" or has "failed"; "": it is tried again after `delay_s`."""
        await self.run(scripts.NOTE_HOOK, job_id, outcome, int(delay_s * 1000))


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
