"""JobEvents: what becomes of a job, as server-sent events that a client can go on reading after a break."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from deepseek_triton.gateway.apis.jobs.queue import told
from deepseek_triton.gateway.apis.wire import sse
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.jobs.job import ENDED, QueuedJob
from deepseek_triton.gateway.jobs.queue import JobQueue

ID = re.compile(r"[0-9]{1,18}(-[0-9]{1,18})?")
LOOK_S = 0.1  # between two looks for new events


class JobEvents:
    """An `EventSource`. after: the id of the last event that the client has. Raises `ApiError` for what is no id."""

    def __init__(self, queue: JobQueue, job: QueuedJob, after: str) -> None:
        if not ID.fullmatch(after):
            raise ApiError(400, f"Last-Event-ID must be the id of an event, got {after[:80]!r}", param="Last-Event-ID")
        self._queue, self._job, self._after = queue, job, after

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Give queued, running, chunk …, and what the job has ended with, last."""
        while True:
            # Whether the job is there is asked first: what it has told before its end is read then.
            with told():
                job = await self._queue.find(self._job.id, self._job.owner)
                events = await self._queue.events(self._job.id, self._after)
            for event in events:
                self._after = event.id
                data = json.loads(event.data)
                if event.kind in ENDED and job is not None:
                    data = await self._form(job)
                yield f"id: {event.id}\n".encode() + sse.event(data, event.kind)
                if event.kind in ENDED:
                    return
            if not events and (job is None or job.has_ended):
                return
            if not events:
                await asyncio.sleep(LOOK_S)

    async def _form(self, job: QueuedJob) -> dict[str, Any]:
        """The job as it has ended, which may have been after it was read."""
        if not job.has_ended:
            with told():
                job = await self._queue.find(job.id, job.owner) or job
        return job.form()

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream which the queue can't give now; the client may go on reading it later."""
        return sse.event(error.body(""), "error")
