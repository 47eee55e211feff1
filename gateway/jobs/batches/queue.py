"""BatchQueue: batches in Redis, beside the queue of jobs to which their lines go. It knows neither files nor HTTP."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_triton.gateway.jobs.batches import scripts
from deepseek_triton.gateway.jobs.batches.batch import (
    ID,
    Batch,
    BatchEndedError,
    BatchesFullError,
    BatchLeaseError,
    NewBatch,
    Segment,
)
from deepseek_triton.gateway.jobs.queue import PREFIX, JobQueue

LINE_KEEP_S = 7 * 86400.0  # for which a line's result waits to be written, after the end of its batch's window
RESULT_BYTES = 4 << 20  # of results that are read at once, if it isn't a single one


@dataclass(frozen=True)
class HeldBatch:
    """A batch that this process runs. lease: proves it."""

    batch: Batch
    lease: str


@dataclass(frozen=True)
class BatchLine:
    """A line of a batch's file. end: bytes of the file up to its end. body: of its request, JSON."""

    number: int
    end: int
    custom_id: str
    body: str


@dataclass(frozen=True)
class LineResult:
    """A line that has ended. status: its job's; "": the job is lost. response, error: JSON, or ""."""

    job_id: str
    custom_id: str
    status: str
    response: str
    error: str


@dataclass(frozen=True)
class BatchState:
    """A batch now. num_open: lines that are in the queue or whose results aren't written; rows: some of these."""

    batch: Batch
    num_open: int
    rows: Sequence[LineResult]


@dataclass(frozen=True)
class BatchStats:
    """Batches that haven't ended, the age of the oldest, and the directories of files in which gateways work."""

    active: int
    oldest_s: float
    stores: int


@dataclass(frozen=True)
class BatchLimits:
    """max_active: an owner's batches that haven't ended. keep_s: how long one that has ended is kept.

    max_waiting, max_bytes: lines that wait in the queue, and bytes of the whole queue up to which lines are added.
    """

    max_active: int
    keep_s: float
    max_waiting: int
    max_bytes: int
    max_attempts: int


class BatchQueue:
    """Every method raises `QueueError` where Redis doesn't answer; those of a `HeldBatch` raise `BatchLeaseError`."""

    def __init__(self, jobs: JobQueue, limits: BatchLimits) -> None:
        self._jobs, self.limits = jobs, limits
        self._lease_ms = int(jobs.limits.lease_s * 1000)

    async def create(self, new: NewBatch, batch_id: str) -> Batch:
        """Keep a batch. Raises `BatchesFullError`."""
        fields = {
            "owner": new.owner,
            "endpoint": new.endpoint,
            "input_file_id": new.input_file_id,
            "completion_window": new.completion_window,
            "metadata": json.dumps(new.metadata if new.metadata is None else dict(new.metadata)),
            "store": new.store,
            "output_s": "" if new.output_s is None else str(new.output_s),
            "caller": new.caller,
            "max_attempts": str(self.limits.max_attempts),
        }
        is_there = await self._run(
            scripts.CREATE,
            batch_id,
            new.owner,
            self.limits.max_active,
            int(new.window_s * 1000),
            int(self.limits.keep_s * 1000),
            *(part for item in fields.items() for part in item),
        )
        if not is_there:
            raise BatchesFullError(f"{self.limits.max_active} batches of this key haven't ended, as many as may")
        batch = await self.find(batch_id, new.owner)
        assert batch is not None
        return batch

    async def find(self, batch_id: str, owner: str) -> Batch | None:
        """The batch, if it is there, of this owner."""
        if not ID.fullmatch(batch_id):
            return None
        batch = await self._find(batch_id)
        return batch if batch is not None and batch.owner == owner else None

    async def page(self, owner: str, after: str, count: int) -> Sequence[Batch] | None:
        """The newest batches of this owner, or those before the one with the id `after`; None: it isn't there."""
        rows = await self._run(scripts.LIST, owner, after, count)
        if rows == 0:
            return None
        return [Batch.from_hash(batch_id.decode(), _pairs(fields)) for batch_id, fields in rows]

    async def cancel(self, batch_id: str, owner: str) -> Batch | None:
        """Let a batch end; it is "cancelling" first. None: it isn't there. Raises `BatchEndedError`."""
        outcome = await self._run(scripts.CANCEL, batch_id, owner)
        batch = await self.find(batch_id, owner) if outcome else None
        if outcome == 2 and batch is not None:
            raise BatchEndedError(f"a batch that is {batch.status} can't be cancelled")
        return batch

    async def stats(self) -> BatchStats:
        """All batches now."""
        active, oldest_ms, stores = await self._run(scripts.STATS)
        return BatchStats(active, oldest_ms / 1000, stores)

    async def active_ids(self) -> set[str]:
        """The batches that haven't ended."""
        rows: Any = await self._jobs.ask(self._jobs.redis.zrange(f"{PREFIX}active", 0, -1))
        return {row.decode() for row in rows}

    async def take(self, store: str, count: int) -> Sequence[HeldBatch]:
        """At most `count` batches whose files are in the directory `store` and that no process runs: this one does."""
        rows = await self._run(scripts.TAKE, store, secrets.token_hex(8), self._lease_ms, count)
        return [
            HeldBatch(Batch.from_hash(batch_id.decode(), _pairs(fields)), lease.decode())
            for batch_id, lease, fields in rows
        ]

    async def release(self, held: HeldBatch) -> None:
        """Let another process run it, at once."""
        await self._run(scripts.RELEASE, held.batch.id, held.lease)

    async def renew(self, held: HeldBatch) -> None:
        """Go on running it."""
        await self._held(scripts.RENEW, held)

    async def start(self, held: HeldBatch, num_lines: int) -> None:
        """Its file is right."""
        await self._held(scripts.START, held, num_lines)

    async def feed(self, held: HeldBatch, lines: Sequence[BatchLine]) -> int:
        """Add lines to the queue; how many of them are in it now, from the first on."""
        limits = self.limits
        flat = (part for line in lines for part in (line.number, line.end, line.custom_id, line.body))
        keep_ms = int(LINE_KEEP_S * 1000)
        fed = await self._held(scripts.FEED, held, limits.max_waiting, limits.max_bytes, keep_ms, *flat)
        return int(fed)

    async def state(self, held: HeldBatch) -> BatchState:
        """The batch, and results to be written."""
        fields, num_open, rows = await self._held(scripts.RESULTS, held, RESULT_BYTES)
        batch = Batch.from_hash(held.batch.id, _pairs(fields))
        return BatchState(batch, num_open, [LineResult(*(part.decode() for part in row)) for row in rows])

    async def commit(
        self, held: HeldBatch, segment: Segment, written: Mapping[str, bool], skipped: Sequence[BatchLine] = ()
    ) -> None:
        """Note that results are on the disk: of jobs, with whether they are completed, and of lines without a job."""
        place = (len(skipped), skipped[-1].number, skipped[-1].end) if skipped else (0, 0, 0)
        flat = (part for job_id, is_completed in written.items() for part in (job_id, int(is_completed)))
        await self._held(scripts.COMMIT, held, segment.name, segment.num_output, segment.num_error, *place, *flat)

    async def close_lines(self, held: HeldBatch, status: str) -> None:
        """End all lines that are in the queue; `status`: "expired" or "cancelled"."""
        await self._held(scripts.CLOSE, held, status)

    async def finalize(
        self, held: HeldBatch, outcome: str, output_file_id: str, error_file_id: str
    ) -> tuple[str, str, str]:
        """Note how the batch ends and the ids of its files; what was noted first holds, and comes back."""
        noted = await self._held(scripts.FINALIZE, held, outcome, output_file_id, error_file_id)
        outcome, output_file_id, error_file_id = (part.decode() for part in noted)
        return outcome, output_file_id, error_file_id

    async def end(self, held: HeldBatch, status: str, errors: Sequence[Mapping[str, Any]] = ()) -> None:
        """It has ended."""
        await self._held(scripts.END, held, status, json.dumps(list(errors)), int(self.limits.keep_s * 1000))

    async def _find(self, batch_id: str) -> Batch | None:
        fields: Any = await self._jobs.ask(self._jobs.redis.hgetall(f"{PREFIX}batch:{batch_id}"))
        return Batch.from_hash(batch_id, fields) if fields else None

    async def _held(self, steps: str, held: HeldBatch, *values: str | float) -> Any:
        outcome = await self._run(steps, held.batch.id, held.lease, self._lease_ms, *values)
        if outcome == -1:
            raise BatchLeaseError(f"another process runs {held.batch.id} now")
        return outcome

    async def _run(self, steps: str, *values: str | float) -> Any:
        return await self._jobs.run(steps, *values, more=scripts.FUNCTIONS)


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
