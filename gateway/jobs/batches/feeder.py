"""BatchFeeder: runs batches: checks their files, feeds their lines to the queue, writes the results down.

A few lines of a batch are in the queue at one time; the rest stays in its file. A process that dies loses nothing: what
counts is in Redis or on the disk, and another process goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

from deepseek_triton.gateway.jobs.batches.batch import BatchLeaseError
from deepseek_triton.gateway.jobs.batches.lines import LineRules
from deepseek_triton.gateway.jobs.batches.queue import BatchQueue, HeldBatch
from deepseek_triton.gateway.jobs.batches.run import BatchRun
from deepseek_triton.gateway.jobs.ending import end_tasks
from deepseek_triton.gateway.jobs.files.store import FileStore
from deepseek_triton.gateway.jobs.files.stored_file import FilesError
from deepseek_triton.gateway.jobs.job import QueueError
from deepseek_triton.gateway.observe.metrics import GatewayMetrics

log = logging.getLogger(__name__)

MAX_RUNS = 8  # batches that one process runs at one time
LOOK_S = 0.5  # between two looks for batches that nobody runs
SWEEP_S = 60.0
PAUSE_S = 1.0  # after an error


class BatchFeeder:
    """Runs the batches whose files are in `files`. window: the lines of one batch that are in the queue at one time."""

    def __init__(
        self,
        queue: BatchQueue,
        files: FileStore,
        rules: LineRules,
        window: int,
        lease_s: float,
        metrics: GatewayMetrics,
    ) -> None:
        self._queue, self._files, self._rules = queue, files, rules
        self._window, self._lease_s, self._metrics = window, lease_s, metrics
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._is_stopping = False
        self._next_sweep = 0.0
        self.num_stores = 0  # directories in which gateways of this Redis keep files

    async def step(self) -> None:
        """Look for batches to run, and measure all; called again and again."""
        store = await asyncio.to_thread(self._files.id)
        if store and not self._is_stopping:
            for held in await self._queue.take(store, MAX_RUNS - len(self._runs)):
                task = asyncio.create_task(self._run(held))
                self._runs[held.lease] = task
                task.add_done_callback(partial(self._forget, held.lease))
        stats = await self._queue.stats()
        self._metrics.batches_active.set(stats.active)
        self._metrics.oldest_batch_s.set(stats.oldest_s)
        if stats.stores > max(self.num_stores, 1):
            log.warning("gateways of this Redis keep files in %d directories: give all one --files-dir", stats.stores)
        self.num_stores = stats.stores
        now = asyncio.get_running_loop().time()
        if store and now >= self._next_sweep:
            self._next_sweep = now + SWEEP_S
            await asyncio.to_thread(self._files.sweep, await self._queue.active_ids())
            self._metrics.files_bytes.set(await asyncio.to_thread(self._files.num_bytes))
        await asyncio.sleep(LOOK_S)

    def drain(self) -> None:
        """Begin no more, and let other processes run these batches; it returns at once."""
        self._is_stopping = True
        for task in self._runs.values():
            task.cancel()

    async def stop(self) -> None:
        """Drain, and wait until it is done."""
        self._is_stopping = True
        await end_tasks(self._runs.values())

    def _forget(self, lease: str, _: asyncio.Task[None]) -> None:
        self._runs.pop(lease, None)

    async def _run(self, held: HeldBatch) -> None:
        running = asyncio.create_task(
            BatchRun(self._queue, self._files, self._rules, self._window, self._metrics, held).run()
        )
        beating = asyncio.create_task(self._beat(held))
        try:
            await asyncio.wait({running, beating}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        except (BatchLeaseError, QueueError, FilesError) as error:
            log.warning("%s waits: %s", held.batch.id, error)
            await asyncio.sleep(PAUSE_S)
        except Exception:
            log.exception("%s waits: a step of it failed", held.batch.id)
            await asyncio.sleep(PAUSE_S)
        finally:
            await end_tasks((running, beating))
            with contextlib.suppress(QueueError, asyncio.TimeoutError):
                await asyncio.wait_for(self._queue.release(held), PAUSE_S)

    async def _beat(self, held: HeldBatch) -> None:
        """Renew the lease until it is lost."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._queue.renew(held)
            except BatchLeaseError:
                return
            except QueueError as error:
                log.warning("%s: %s", held.batch.id, error)
