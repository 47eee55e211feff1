"""BatchRun: one batch from where it is to its end, or until this process loses its lease.

validating → in_progress → finalizing → completed or expired; validating → failed; cancelling → cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from deepseek_triton.gateway.jobs.batches.batch import Batch
from deepseek_triton.gateway.jobs.batches.lines import LineRules, check_file, read_lines
from deepseek_triton.gateway.jobs.batches.queue import BatchLine, BatchQueue, BatchState, HeldBatch, LineResult
from deepseek_triton.gateway.jobs.batches.results import SegmentWriter, job_id_of, join, remove
from deepseek_triton.gateway.jobs.files.store import FileStore
from deepseek_triton.gateway.jobs.files.stored_file import StoredFile
from deepseek_triton.gateway.jobs.job import QueueError
from deepseek_triton.gateway.observe.metrics import GatewayMetrics

log = logging.getLogger(__name__)

Result = TypeVar("Result")
GROUP = 64  # lines that are read at once, at most
MANY = 32  # results that are worth a write to the disk
LOOK_S = 0.05  # between two looks for results
AFTER_ERROR_S = 0.5
INPUT = "input"  # the batch's own name of its file, which may be deleted meanwhile

LOST = {"code": "file_lost", "message": "the batch's file isn't there any more", "param": None, "line": None}


class BatchRun:
    """Runs the batch `held`. window: lines that are in the queue at one time. Raises what can't be waited out."""

    def __init__(
        self,
        queue: BatchQueue,
        files: FileStore,
        rules: LineRules,
        window: int,
        metrics: GatewayMetrics,
        held: HeldBatch,
    ) -> None:
        self._queue, self._files, self._rules, self._window = queue, files, rules, window
        self._metrics, self._held = metrics, held
        self._folder = files.work(held.batch.id)
        self._read: list[BatchLine] = []  # lines that aren't in the queue yet

    async def run(self) -> None:
        """Do everything. Raises `BatchLeaseError`, `FilesError`, `OSError`."""
        batch = self._held.batch
        if not (self._folder / INPUT).exists():
            await self._fail([LOST])
            return
        if batch.status == "validating" and not await self._validate(batch):
            return
        name = self._held.lease.partition("_")[0]
        with SegmentWriter(self._folder, name) as segment:
            while True:
                try:
                    state = await self._queue.state(self._held)
                    outcome = _outcome(state.batch)
                    is_over, is_idle = await self._step(state, outcome, segment)
                except QueueError as error:
                    log.warning("%s: %s", batch.id, error)
                    await asyncio.sleep(AFTER_ERROR_S)
                    continue
                if is_over:
                    break
                if is_idle:
                    await asyncio.sleep(LOOK_S)
        await self._finish(state.batch, outcome)

    async def _validate(self, batch: Batch) -> bool:
        """Check the whole file; whether its lines may be run."""
        num_lines, faults = await asyncio.to_thread(check_file, self._folder / INPUT, batch.endpoint, self._rules)
        if faults:
            await self._fail(faults)
            return False
        await persist(lambda: self._queue.start(self._held, num_lines))
        return True

    async def _fail(self, faults: Sequence[Mapping[str, Any]]) -> None:
        await persist(lambda: self._queue.end(self._held, "failed", faults))
        await asyncio.to_thread(remove, self._folder)

    async def _step(self, state: BatchState, outcome: str, segment: SegmentWriter) -> tuple[bool, bool]:
        """Write what has come, feed the queue; whether every line has its result, and whether there is little to do."""
        batch, num_rows = state.batch, len(state.rows)
        if num_rows:
            await self._write(state.rows, segment)
        num_open = state.num_open - num_rows
        if outcome == "completed" and batch.status == "in_progress":
            num_fed = await self._feed(batch, self._window - num_open)
            is_over = not (num_rows or num_open or num_fed or self._read)
            return is_over, num_rows < MANY and num_fed < GROUP
        if num_open:
            await self._queue.close_lines(self._held, outcome)
            return False, False
        return not await self._skip(batch, outcome, segment) and not num_rows, False

    async def _write(
        self, rows: Sequence[LineResult], segment: SegmentWriter, skipped: Sequence[BatchLine] = ()
    ) -> None:
        written = await asyncio.to_thread(segment.write, rows)
        # Said again and again until Redis knows: a state that is read before gives the same results once more.
        await persist(lambda: self._queue.commit(self._held, segment.written, {} if skipped else written, skipped))
        for is_completed in written.values():
            self._metrics.batch_lines.labels("completed" if is_completed else "failed").inc()

    async def _feed(self, batch: Batch, room: int) -> int:
        """Put lines into the queue; how many."""
        if room <= 0:
            return 0
        if not self._read:
            self._read = await self._next_lines(batch, min(room, GROUP))
        if not self._read:
            return 0
        num_fed = await self._queue.feed(self._held, self._read[:room])
        self._read = self._read[num_fed:]
        return num_fed

    async def _skip(self, batch: Batch, outcome: str, segment: SegmentWriter) -> bool:
        """Write that lines which were never in the queue have no answer; False: there are none."""
        lines = await self._next_lines(batch, GROUP)
        if not lines:
            return False
        rows = [LineResult(job_id_of(batch, line.number), line.custom_id, outcome, "", "") for line in lines]
        await self._write(rows, segment, lines)
        return True

    async def _next_lines(self, batch: Batch, count: int) -> list[BatchLine]:
        if "in_progress" not in batch.times:  # cancelled before its file was looked at
            return []
        place = batch.fed_lines, batch.fed_bytes
        return await asyncio.to_thread(read_lines, self._folder / INPUT, batch.endpoint, self._rules, place, count)

    async def _finish(self, batch: Batch, outcome: str) -> None:
        """Make the files, and end the batch. Each step may be done again by another process."""
        sizes = {
            "output": sum(segment.num_output for segment in batch.segments),
            "error": sum(segment.num_error for segment in batch.segments),
        }
        made = {kind: self._file(batch, kind, size) if size else None for kind, size in sizes.items()}
        output_id, error_id = (file.id if file else "" for file in made.values())
        noted, *ids = await persist(lambda: self._queue.finalize(self._held, outcome, output_id, error_id))
        for (kind, file), file_id in zip(made.items(), ids, strict=True):
            if file is not None and await asyncio.to_thread(self._files.find, batch.owner, file_id) is None:
                await asyncio.to_thread(self._publish, batch, kind, replace(file, id=file_id))
        await persist(lambda: self._queue.end(self._held, noted))
        await asyncio.to_thread(remove, self._folder)

    def _publish(self, batch: Batch, kind: str, file: StoredFile) -> None:
        whole = join(self._folder, batch.segments, kind, self._held.lease)
        self._files.put(batch.owner, file, whole)

    def _file(self, batch: Batch, kind: str, num_bytes: int) -> StoredFile:
        return self._files.new(f"{batch.id}_{kind}.jsonl", "batch_output", num_bytes, batch.output_s)


def _outcome(batch: Batch) -> str:
    """How a batch ends that isn't over yet."""
    if batch.status == "cancelling":
        return "cancelled"
    return "expired" if batch.times["expires"] <= time.time() else "completed"


async def persist(step: Callable[[], Awaitable[Result]]) -> Result:
    """Do what may be said twice to Redis, again and again while it doesn't answer: it may be starting."""
    while True:
        try:
            return await step()
        except QueueError as error:
            log.warning("%s", error)
            await asyncio.sleep(AFTER_ERROR_S)
