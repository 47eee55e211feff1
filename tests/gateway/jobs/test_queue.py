"""JobQueue: each job ends once, whatever dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import redis

from deepseek_triton.gateway.jobs.job import JobsFullError, KeyReusedError, NewJob, QueueError
from deepseek_triton.gateway.jobs.queue import PREFIX, JobQueue, QueueLimits
from tests.support.redis import needs_redis, redis_process

pytestmark = needs_redis
NEW = NewJob("alice", "/v1/completions", '{"prompt":"x"}')
LIMITS = QueueLimits()
SHORT_LEASE = QueueLimits(lease_s=0.15)  # where a worker dies


def use(url: str, work: Callable[[JobQueue], Awaitable[None]], limits: QueueLimits = LIMITS) -> None:
    """Run `work` with a queue."""

    async def run() -> None:
        queue = JobQueue(url, limits)
        try:
            await work(queue)
        finally:
            await queue.close()

    asyncio.run(run())


def test_a_job_is_taken_once_and_ends_with_one_result(redis_url: str, store: redis.Redis) -> None:
    async def work(queue: JobQueue) -> None:
        job = await queue.submit(NEW)
        (taken,) = await queue.take(5)
        assert (taken.job.id, taken.job.attempts, taken.job.status) == (job.id, 1, "running")
        assert await queue.take(5) == []
        assert await queue.finish(taken, "completed", '{"status_code":200,"body":{}}')
        assert not await queue.finish(replace(taken, lease="another's"), "failed", "{}")
        found = await queue.find(job.id, "alice")
        assert found is not None and (found.status, found.response) == ("completed", {"status_code": 200, "body": {}})
        assert await queue.find(job.id, "bob") is None

    use(redis_url, work)


def test_the_most_urgent_is_taken_first_and_of_those_the_oldest(redis_url: str, store: redis.Redis) -> None:
    async def work(queue: JobQueue) -> None:
        ids = {}
        for name, priority in (("a", "low"), ("b", "normal"), ("c", "high"), ("d", "normal")):
            ids[(await queue.submit(replace(NEW, priority=priority))).id] = name
            await asyncio.sleep(0.002)
        stats = await queue.stats()
        assert stats.waiting == {"high": 1, "normal": 2, "low": 1, "batch": 0} and stats.oldest_s > 0
        assert [ids[taken.job.id] for taken in await queue.take(10)] == ["c", "b", "d", "a"]

    use(redis_url, work)


def test_recovery_after_a_worker_was_killed(redis_url: str, store: redis.Redis) -> None:
    """Complaint: recovery that stops after a kill -9. What the second worker stores is kept."""

    async def work(queue: JobQueue) -> None:
        job = await queue.submit(NEW)
        (dead,) = await queue.take(1)
        await asyncio.sleep(0.2)
        (alive,) = await queue.take(1)
        assert (alive.job.id, alive.job.attempts) == (job.id, 2)
        assert not await queue.finish(dead, "completed", '{"body":"of the dead"}')  # it was only paused
        assert await queue.finish(alive, "completed", '{"body":"of the living"}')
        assert not await queue.finish(dead, "completed", '{"body":"of the dead"}')
        found = await queue.find(job.id, "alice")
        assert found is not None and found.response == {"body": "of the living"}

    use(redis_url, work, SHORT_LEASE)


@pytest.mark.slow
def test_a_job_isnt_executed_again_because_it_took_long(redis_url: str, store: redis.Redis) -> None:
    """Complaint: a job executed again because it took long. The heartbeat renews its lease."""

    async def work(queue: JobQueue) -> None:
        await queue.submit(NEW)
        (taken,) = await queue.take(1)
        for _ in range(12):  # two leases
            await asyncio.sleep(0.1)
            assert await queue.renew([taken]) == set()
            assert await queue.take(1) == []
        assert await queue.finish(taken, "completed", "{}")

    use(redis_url, work, QueueLimits(lease_s=0.6))


@pytest.mark.slow
def test_a_job_whose_workers_all_die_is_a_dead_letter(redis_url: str, store: redis.Redis) -> None:
    async def work(queue: JobQueue) -> None:
        job = await queue.submit(replace(NEW, max_attempts=2))
        for _ in range(2):
            assert len(await queue.take(1)) == 1
            await asyncio.sleep(0.2)
        assert await queue.take(1) == []
        found = await queue.find(job.id, "alice")
        assert found is not None and found.status == "failed" and found.error["code"] == "worker_lost"
        assert found.body == NEW.body and (await queue.stats()).dead == 1

    use(redis_url, work, SHORT_LEASE)


@pytest.mark.slow
def test_failures_are_tried_again_later_and_end(redis_url: str, store: redis.Redis) -> None:
    async def work(queue: JobQueue) -> None:
        job = await queue.submit(replace(NEW, max_attempts=2))
        (taken,) = await queue.take(1)
        assert await queue.retry(taken, 0.5, '{"status_code":502}', "")
        assert await queue.take(1) == [] and (await queue.stats()).later == 1
        await asyncio.sleep(0.52)
        (taken,) = await queue.take(1)
        assert await queue.give_back(taken)  # a drain: it doesn't count
        (taken,) = await queue.take(1)
        assert taken.job.attempts == 2
        assert await queue.retry(taken, 0.1, '{"status_code":502}', "")
        found = await queue.find(job.id, "alice")
        assert found is not None and (found.status, found.response) == ("failed", {"status_code": 502})

    use(redis_url, work)


def test_an_idempotency_key_makes_one_job(redis_url: str, store: redis.Redis) -> None:
    async def work(queue: JobQueue) -> None:
        new = replace(NEW, idempotency_key="k" * 255)
        first = await queue.submit(new)
        assert (await queue.submit(new)).id == first.id
        assert (await queue.submit(replace(new, owner="bob"))).id != first.id
        with pytest.raises(KeyReusedError):
            await queue.submit(replace(new, body="{}"))

    use(redis_url, work)


def test_a_full_queue_refuses_by_number_and_by_bytes(redis_url: str, store: redis.Redis) -> None:
    async def number(queue: JobQueue) -> None:
        for _ in range(3):
            await queue.submit(NEW)
        with pytest.raises(JobsFullError, match="jobs wait"):
            await queue.submit(NEW)

    async def num_bytes(queue: JobQueue) -> None:
        await queue.submit(replace(NEW, body="x" * 2000))
        with pytest.raises(JobsFullError, match="bytes are kept"):
            await queue.submit(replace(NEW, body="x" * 2000))

    use(redis_url, number, replace(LIMITS, max_waiting=3))
    store.flushall()
    use(redis_url, num_bytes, replace(LIMITS, max_bytes=3000))


@pytest.mark.parametrize("is_running", [True, False])
def test_a_cancelled_job_has_ended_and_its_worker_learns_it(
    redis_url: str, store: redis.Redis, is_running: bool
) -> None:
    async def work(queue: JobQueue) -> None:
        job = await queue.submit(NEW)
        taken = await queue.take(1) if is_running else []
        assert await queue.cancel(job.id, "bob") is None
        ended = await queue.cancel(job.id, "alice")
        assert ended is not None and ended.status == "cancelled"
        assert await queue.renew(taken) == {one.job.id for one in taken}
        for one in taken:
            assert not await queue.finish(one, "completed", "{}")
            assert not await queue.give_back(one)
        assert await queue.take(1) == []

    use(redis_url, work)


@pytest.mark.slow
def test_jobs_expire_whether_they_wait_or_run(redis_url: str, store: redis.Redis) -> None:
    async def work(queue: JobQueue) -> None:
        jobs = [await queue.submit(replace(NEW, ttl_s=0.5)) for _ in range(2)]
        (taken,) = await queue.take(1)
        await asyncio.sleep(0.52)
        assert await queue.sweep() == 2
        for job in jobs:
            found = await queue.find(job.id, "alice")
            assert found is not None and found.status == "expired" and found.error["code"] == "expired"
        assert await queue.renew([taken]) == {taken.job.id} and await queue.take(5) == []

    use(redis_url, work)


@pytest.mark.slow
def test_no_key_leaks(redis_url: str, store: redis.Redis) -> None:
    """Complaint: Redis keys that leak. After the work and the times for which things are kept, nothing is left."""

    async def work(queue: JobQueue) -> None:
        for number in range(30):
            await queue.submit(replace(NEW, idempotency_key=str(number), ttl_s=0.3, max_attempts=1))
        for one in await queue.take(10):
            await queue.finish(one, "completed", '{"a":1}')
        for one in await queue.take(5):
            await queue.retry(one, 0.01, "{}", "")
        await queue.take(5)  # never heard of again
        for key in store.scan_iter():
            has_name_of_job = any(part in key for part in ("job:", "events:", "idem:"))
            assert (store.pttl(key) > 0) == (has_name_of_job or key.endswith("bell")), key
        await asyncio.sleep(0.35)
        await queue.sweep()
        await asyncio.sleep(0.35)
        while await queue.sweep():
            pass
        left = set(store.scan_iter()) - {f"{PREFIX}bell"}
        assert left == {f"{PREFIX}bytes"} and store.get(f"{PREFIX}bytes") == "0"
        assert store.llen(f"{PREFIX}bell") <= 64

    use(redis_url, work, replace(SHORT_LEASE, keep_s=0.3))


def test_events_tell_everything_in_order(redis_url: str, store: redis.Redis) -> None:
    async def work(queue: JobQueue) -> None:
        job = await queue.submit(NEW)
        (taken,) = await queue.take(1)
        for _ in range(2):  # the second time is the same as the first
            assert await queue.emit(taken, 0, ['{"a":1}', '{"a":2}'])
        assert not await queue.emit(replace(taken, lease="another's"), 2, ["{}"])
        await queue.finish(taken, "completed", "{}")
        events = await queue.events(job.id, "0-0")
        assert [event.kind for event in events] == ["queued", "running", "chunk", "chunk", "completed"]
        assert await queue.events(job.id, events[2].id) == events[3:]

    use(redis_url, work)


@pytest.mark.slow
def test_killed_at_each_step_a_redis_loses_nothing() -> None:
    """Complaint: recovery that stops after a kill -9 at the wrong moment. Redis is killed after each step of a job."""

    async def work(queue: JobQueue) -> None:
        with pytest.raises(QueueError):
            redis.kill()
            await queue.submit(NEW)
        redis.start()
        new = replace(NEW, idempotency_key="mine")
        job = await queue.submit(new)
        restart()
        assert (await queue.submit(new)).id == job.id
        (taken,) = await queue.take(1)
        restart()
        assert await queue.renew([taken]) == set()
        restart()
        assert await queue.retry(taken, 0.01, "{}", "")
        restart()
        await asyncio.sleep(0.02)
        (taken,) = await queue.take(1)
        assert (taken.job.id, taken.job.attempts) == (job.id, 2)
        assert await queue.finish(taken, "completed", '{"body":1}')
        restart()
        assert await queue.finish(taken, "completed", '{"body":2}')  # its answer got lost: it is said again
        found = await queue.find(job.id, "alice")
        assert found is not None and found.response == {"body": 1}

    def restart() -> None:
        redis.kill()
        redis.start()

    with redis_process() as redis:
        use(redis.url, work, replace(LIMITS, lease_s=30))
