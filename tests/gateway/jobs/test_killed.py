"""Processes of the queue that are killed with -9: what they ran is run by another."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from deepseek_triton.gateway.jobs.queue import PREFIX
from tests.gateway.jobs.test_batches_api import counts, create, ended, line, results, until
from tests.gateway.jobs.test_jobs_api import ended as ended_job
from tests.gateway.jobs.test_jobs_api import submit, wait_until_running
from tests.support.gateway_process import GatewayProcess, gateway_process
from tests.support.redis import needs_redis, redis_process

pytestmark = [pytest.mark.slow, needs_redis]


def test_jobs_of_a_worker_that_is_killed_are_run_by_another(redis_url: str, store: redis.Redis, tmp_path: Path) -> None:
    """Complaint: recovery that stops after a kill -9 at the wrong moment. One result is stored, by the second."""
    directories = tmp_path / "a", tmp_path / "b"
    for directory in directories:
        directory.mkdir()
    settings: dict[str, Any] = {"redis_url": redis_url, "job_lease_s": 1.0}
    with gateway_process(directories[0], pause_s=60.0, **settings) as victim:
        with httpx.Client(base_url=victim.url) as client:
            jobs = [submit(client) for _ in range(3)]
            for job_id in jobs:
                wait_until_running(client, job_id)
        victim.process.kill()
        victim.process.wait()
    with gateway_process(directories[1], **settings) as other, httpx.Client(base_url=other.url) as client:
        for job_id in jobs:
            job = ended_job(client, job_id)
            assert (job["status"], job["attempts"]) == ("completed", 2)
            events: Any = store.xrange(f"{PREFIX}events:{job_id}")
            kinds = [data["event"] for _, data in events]
            assert kinds == ["queued", "running", "running", "completed"]


def test_a_batch_whose_gateways_and_redis_are_killed_has_each_result_once(tmp_path: Path) -> None:
    """Two gateways with one directory; what runs is killed with -9 again and again until the batch ends."""
    lines = [line(str(index)) for index in range(300)]
    with redis_process() as redis_of_its_own, contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {
            "redis_url": redis_of_its_own.url, "files_dir": str(tmp_path / "files"), "job_lease_s": 1.0,
            "job_attempts": 20, "job_concurrency": 4, "max_running": 0, "max_running_per_key": 0,
        }  # fmt: skip

        def start() -> tuple[GatewayProcess, openai.OpenAI]:
            process = stack.enter_context(gateway_process(tmp_path, pause_s=0.05, **settings))
            return process, openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=8)

        first, client = start()
        batch = create(client, lines)
        until(client, batch, lambda one: counts(one)[1] > 20)
        second, other = start()
        first.process.kill()
        until(other, batch, lambda one: counts(one)[1] > 80)
        redis_of_its_own.kill()
        redis_of_its_own.start()
        until(other, batch, lambda one: counts(one)[1] > 140)
        second.process.kill()
        _, last = start()
        batch = ended(last, batch)
        assert batch.status == "completed" and counts(batch) == (300, 300, 0)
        assert set(results(last, batch.output_file_id)) == {one["custom_id"] for one in lines}
        for one in (client, other, last):
            one.close()
