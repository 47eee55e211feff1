"""BatchRun: killed at each of its steps, it goes on in another process, and each line has one result."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
import redis

from deepseek_triton.gateway.jobs.batches import run
from deepseek_triton.gateway.jobs.batches.batch import Batch, BatchLeaseError, NewBatch, Segment
from deepseek_triton.gateway.jobs.batches.lines import LineRules
from deepseek_triton.gateway.jobs.batches.queue import BatchLimits, BatchQueue, HeldBatch, LineResult
from deepseek_triton.gateway.jobs.batches.results import SegmentWriter, join, line_of
from deepseek_triton.gateway.jobs.batches.run import INPUT, BatchRun
from deepseek_triton.gateway.jobs.ending import end_tasks
from deepseek_triton.gateway.jobs.files.store import FileLimits, FileStore
from deepseek_triton.gateway.jobs.job import QueueError
from deepseek_triton.gateway.jobs.queue import PREFIX, JobQueue, QueueLimits
from deepseek_triton.gateway.observe.metrics import GatewayMetrics
from deepseek_triton.gateway.protection.strict_json import JsonBounds
from tests.support.redis import needs_redis

PATH = "/v1/completions"
RULES = LineRules(JsonBounds(64, 1000), 10_000, 100, 3)
NEW = NewBatch("alice", PATH, "file-x", "24h", 3600.0, None, "store")
LIMITS = BatchLimits(max_active=10, keep_s=3600.0, max_waiting=100, max_bytes=1 << 20, max_attempts=1)
NUM_LINES = 5
METRICS = GatewayMetrics()


class KilledError(Exception):
    """The process dies here."""


class DyingQueue(BatchQueue):
    """Dies at one of its calls to Redis, before or after Redis has done it; or loses Redis' answer there."""

    dies_at, is_after, error = 0, False, KilledError()

    async def _held(self, steps: str, held: HeldBatch, *values: str | float) -> Any:
        self.dies_at -= 1
        if self.dies_at == 0 and not self.is_after:
            raise self.error
        outcome = await super()._held(steps, held, *values)
        if self.dies_at == 0:
            raise self.error
        return outcome


async def answer(jobs: JobQueue) -> None:
    """A worker."""
    while True:
        for taken in await jobs.take(2):
            status = "failed" if taken.job.id.endswith("_3") else "completed"
            await jobs.finish(taken, status, '{"status_code":200,"body":{}}')
        await asyncio.sleep(0.005)


async def run_to_its_end(queue: DyingQueue, files: FileStore, *, is_cancelled: bool) -> tuple[Batch, int]:
    """A batch, run by a process that dies at `queue.dies_at` and by others after it; and how many died."""
    batch_id = "batch_" + "0" * 32
    folder = files.work(batch_id)
    folder.mkdir(parents=True)
    lines = ({"custom_id": f"{index}", "method": "POST", "url": PATH, "body": {}} for index in range(NUM_LINES))
    (folder / INPUT).write_text("\n\n".join(map(json.dumps, lines)))
    await queue.create(NEW, batch_id)
    if is_cancelled:
        await queue.cancel(batch_id, "alice")
    num_killed = 0
    while True:
        held = await queue.take("store", 1)
        if not held:
            batch = await queue.find(batch_id, "alice")
            assert batch is not None
            return batch, num_killed
        try:
            await asyncio.wait_for(BatchRun(queue, files, RULES, 3, METRICS, held[0]).run(), 20)
        except KilledError:
            num_killed += 1
            await queue.release(held[0])  # its lease ends


def judge(files: FileStore, batch: Batch) -> None:
    rows = []
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id:
            file = files.find("alice", file_id)
            assert file is not None
            text = files.path("alice", file).read_text()
            assert file.num_bytes == len(text)
            rows += [json.loads(line)["custom_id"] for line in text.splitlines()]
    assert sorted(rows) == [str(index) for index in range(NUM_LINES)]
    assert (batch.total, batch.completed, batch.failed) == (NUM_LINES, NUM_LINES - 1, 1)
    if files.work(batch.id).exists():  # killed at the very end: it is swept
        os.utime(files.work(batch.id), (0, 0))
        files.sweep(set())
    assert not files.work(batch.id).exists()


@pytest.mark.slow
@needs_redis
@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("error", [KilledError(), QueueError("no answer")])
def test_killed_at_each_step_a_batch_loses_nothing(
    redis_url: str,
    store: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_after: bool,
    error: Exception,
) -> None:
    monkeypatch.setattr(run, "AFTER_ERROR_S", 0.01)

    async def work() -> None:
        jobs = JobQueue(redis_url, QueueLimits(lease_s=30))
        worker = asyncio.create_task(answer(jobs))
        for step in range(1, 100):
            store.flushall()
            files = FileStore(tmp_path / str(step), FileLimits())
            files.make()
            queue = DyingQueue(jobs, LIMITS)
            queue.dies_at, queue.is_after, queue.error = step, is_after, error  # type: ignore[assignment]
            batch, num_killed = await run_to_its_end(queue, files, is_cancelled=False)
            assert batch.status == "completed"
            judge(files, batch)
            left = [key for key in store.scan_iter() if "open:" in key or "ended:" in key or ":job:" in key]
            assert left == [] and not store.exists(f"{PREFIX}active", f"{PREFIX}deadlines", f"{PREFIX}sizes")
            assert all(int(store.pttl(key)) > 0 for key in store.scan_iter() if "batch" in key)
            if queue.dies_at > 0:  # it has ended before that step
                break
            assert num_killed == isinstance(error, KilledError)
        assert step > 7
        await end_tasks((worker,), 0.1)
        await jobs.close()

    asyncio.run(work())


@needs_redis
def test_a_process_that_was_only_paused_writes_nothing_that_counts(
    redis_url: str, store: redis.Redis, tmp_path: Path
) -> None:
    async def work() -> None:
        jobs = JobQueue(redis_url, QueueLimits(lease_s=30))
        queue = BatchQueue(jobs, LIMITS)
        batch = await queue.create(NEW, "batch_" + "0" * 32)
        (paused,) = await queue.take("store", 1)
        assert await queue.take("store", 1) == [] and await queue.take("another", 1) == []
        await queue.release(paused)
        (other,) = await queue.take("store", 1)
        for call in (queue.start(paused, 3), queue.state(paused), queue.commit(paused, Segment("x", 9), {})):
            with pytest.raises(BatchLeaseError):
                await call
        await queue.start(other, 3)
        await queue.commit(other, Segment("y", 5, 6), {})
        state = await queue.state(other)
        assert state.batch.id == batch.id and state.batch.segments == [Segment("y", 5, 6)]
        await jobs.close()

    asyncio.run(work())


def test_what_is_behind_the_bytes_that_count_is_in_no_file(tmp_path: Path) -> None:
    with SegmentWriter(tmp_path, "a") as first, SegmentWriter(tmp_path, "b") as second:
        first.write([LineResult("1", "x", "completed", '{"body":{}}', "")])
        counted = first.written
        first.write([LineResult("2", "y", "completed", '{"body":{}}', "")])  # Redis never heard of it
        second.write([LineResult("2", "y", "completed", "{\n}", ""), LineResult("3", "z", "", "", "")])
    output, errors = (
        join(tmp_path, [counted, second.written], kind, "w").read_text().splitlines() for kind in ("output", "error")
    )
    assert [json.loads(line)["custom_id"] for line in output] == ["x", "y"]
    assert [json.loads(line)["error"]["code"] for line in errors] == ["result_lost"]


@pytest.mark.parametrize(
    ("row", "response", "code"),
    [
        (LineResult("1", "a", "failed", '{"status_code":404}', ""), {"status_code": 404}, None),
        (LineResult("1", "a", "failed", "", '{"code":"worker_lost","message":"x"}'), None, "worker_lost"),
        (LineResult("1", "a", "expired", "", '{"code":"expired"}'), None, "batch_expired"),
        (LineResult("1", "a", "cancelled", "", ""), None, "batch_cancelled"),
    ],
)
def test_lines_without_success(row: LineResult, response: object, code: str | None) -> None:
    text, is_completed = line_of(row)
    line = json.loads(text)
    assert not is_completed and line["response"] == response
    assert (line["error"] or {}).get("code") == code
