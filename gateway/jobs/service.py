"""JobService: the queue of one process, its worker, and what is done beside them once a second."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.types import ASGIApp

from deepseek_triton.gateway.jobs.batches.feeder import BatchFeeder
from deepseek_triton.gateway.jobs.batches.lines import LineRules
from deepseek_triton.gateway.jobs.batches.queue import BatchLimits, BatchQueue
from deepseek_triton.gateway.jobs.ending import end_tasks
from deepseek_triton.gateway.jobs.files.store import FileLimits, FileStore
from deepseek_triton.gateway.jobs.job import QueueError
from deepseek_triton.gateway.jobs.queue import JobQueue, QueueLimits
from deepseek_triton.gateway.jobs.webhooks import Webhooks
from deepseek_triton.gateway.jobs.worker import JobWorker, Work
from deepseek_triton.gateway.observe.metrics import GatewayMetrics
from deepseek_triton.gateway.protection.keys.caller import Caller
from deepseek_triton.gateway.protection.limits.rates import CallerRates
from deepseek_triton.gateway.protection.strict_json import JsonBounds
from deepseek_triton.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

TEND_S = 1.0
HOOKS_S = 0.5
AFTER_ERROR_S = 1.0


class JobService:
    """app: answers the requests of jobs. is_ready: whether the models' server is there."""

    def __init__(
        self, settings: GatewaySettings, app: ASGIApp, is_ready: Callable[[], Awaitable[bool]], metrics: GatewayMetrics
    ) -> None:
        limits = QueueLimits(
            settings.max_jobs_waiting, settings.max_queue_bytes, settings.job_result_s, settings.job_lease_s
        )
        self.queue = JobQueue(settings.redis_url, limits)
        self.files = FileStore(files_directory(settings), _file_limits(settings))
        self.batches = BatchQueue(self.queue, _batch_limits(settings))
        self._feeder = BatchFeeder(
            self.batches, self.files, _line_rules(settings), settings.batch_window, settings.job_lease_s, metrics
        )
        self._metrics = metrics
        self._rates = CallerRates(settings.redis_url)
        self._webhooks = Webhooks(self.queue, metrics, settings.webhook_hosts)
        work = Work(app, is_ready, self._charge, metrics)
        self._worker = JobWorker(self.queue, work, settings.job_concurrency) if settings.job_concurrency else None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_stores(self) -> int:
        """The directories in which gateways of this Redis keep files; it should be one."""
        return self._feeder.num_stores

    def start(self) -> None:
        """Begin, in the event loop that serves."""
        steps = [(self._tend, TEND_S), (self._feeder.step, 0.0)]
        if self._worker is not None:
            self._worker.start()
            steps.append((self._webhooks.step, HOOKS_S))
        self._tasks = [asyncio.create_task(self._repeat(step, pause_s)) for step, pause_s in steps]

    def drain(self) -> None:
        """Give the jobs and batches that run back at once; it doesn't wait for that."""
        self._feeder.drain()
        if self._worker is not None:
            self._worker.drain()

    async def close(self) -> None:
        """End everything."""
        await self._feeder.stop()
        if self._worker is not None:
            await self._worker.stop()
        await end_tasks(self._tasks)
        await self._webhooks.close()
        await self._rates.close()
        await self.queue.close()

    async def _tend(self) -> None:
        """Forget what is over, and measure the rest."""
        await self.queue.sweep()
        stats, metrics = await self.queue.stats(), self._metrics
        for priority, count in stats.waiting.items():
            metrics.jobs_waiting.labels(priority).set(count)
        metrics.jobs_waiting.labels("later").set(stats.later)
        metrics.jobs_running.set(stats.running)
        metrics.jobs_dead.set(stats.dead)
        metrics.oldest_job_s.set(stats.oldest_s)
        metrics.queue_bytes.set(stats.num_bytes)

    async def _charge(self, caller: str, tokens_per_minute: int, num_tokens: int) -> None:
        try:
            await self._rates.charge(Caller(caller, 0, tokens_per_minute, 0), num_tokens)
        except Exception as error:  # the library's, and redis-py's
            log.error("tokens of a job aren't counted: %s", error)

    async def _repeat(self, step: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            try:
                await step()
                await asyncio.sleep(pause_s)
            except QueueError as error:
                log.warning("%s", error)
                await asyncio.sleep(AFTER_ERROR_S)
            except Exception:
                log.exception("a step beside the queue failed")
                await asyncio.sleep(AFTER_ERROR_S)


def files_directory(settings: GatewaySettings) -> Path:
    """Where files are kept."""
    if settings.files_dir:
        return Path(settings.files_dir)
    state = os.environ.get("XDG_STATE_HOME") or Path(os.environ.get("HOME", "/")) / ".local" / "state"
    return Path(state) / "deepseek-gateway" / "files"


def _file_limits(settings: GatewaySettings) -> FileLimits:
    return FileLimits(
        settings.max_file_bytes, settings.max_key_files_bytes, settings.max_files_bytes, settings.file_keep_s
    )


def _batch_limits(settings: GatewaySettings) -> BatchLimits:
    """Batches leave half of the queue's bytes to jobs."""
    return BatchLimits(
        settings.max_batches,
        settings.file_keep_s,
        settings.max_jobs_waiting,
        settings.max_queue_bytes // 2,
        settings.job_attempts,
    )


def _line_rules(settings: GatewaySettings) -> LineRules:
    bounds = JsonBounds(
        settings.max_json_depth + 1, settings.max_json_members
    )  # a body is one level deeper in its line
    return LineRules(bounds, settings.max_body_bytes, settings.max_batch_lines, settings.batch_priority)
