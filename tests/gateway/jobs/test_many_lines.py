"""A batch of 20,000 lines: the gateway's memory and Redis's stay as they are with a tenth of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
from openai.types import Batch

from deepseek_triton.gateway.jobs import scripts
from deepseek_triton.gateway.jobs.queue import PREFIX
from tests.gateway.test_app import CHAT
from tests.support.gateway_process import GatewayProcess, gateway_process
from tests.support.redis import needs_redis

pytestmark = [pytest.mark.slow, needs_redis]

COUNT = 20_000
PADDING = "x" * 1000  # 23 MB in all
ANSWER = json.dumps({"status_code": 200, "request_id": "x", "body": {"text": PADDING}})


def lines(count: int) -> Iterator[bytes]:
    body = {**CHAT, "messages": [{"role": "user", "content": PADDING}]}
    for index in range(count):
        line = {"custom_id": f"line {index}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        yield json.dumps(line).encode() + b"\n"


class Peaks:
    """The most that the gateway and Redis used, in MiB."""

    def __init__(self, process: GatewayProcess, store: redis.Redis) -> None:
        self._process, self._store = process, store
        self.gateway = self.redis = 0.0

    def look(self) -> None:
        memory: Any = self._store.info("memory")
        self.gateway = max(self.gateway, self._process.rss_mib())
        self.redis = max(self.redis, memory["used_memory"] / 2**20)


def answer_all(store: redis.Redis, peaks: Peaks, count: int) -> None:
    """Stand in for workers, which would take minutes."""
    take, finish = (store.register_script(scripts.script(steps)) for steps in (scripts.TAKE, scripts.FINISH))
    num_answered = 0
    deadline = time.monotonic() + 300
    while num_answered < count:
        taken: Any = take(keys=(PREFIX,), args=("token", 60_000, 256))
        with store.pipeline(transaction=False) as together:
            for job_id, lease, _ in taken:
                finish(keys=(PREFIX,), args=(job_id, lease, "completed", ANSWER, ""), client=together)
            assert all(together.execute())
        num_answered += len(taken)
        assert time.monotonic() < deadline, num_answered
        if not taken:
            peaks.look()
            time.sleep(0.02)


def run(client: openai.OpenAI, store: redis.Redis, path: Path, peaks: Peaks, count: int) -> Batch:
    with path.open("wb") as written:
        written.writelines(lines(count))
    with path.open("rb") as stream:
        file = client.files.create(file=stream, purpose="batch")
    endpoint: Any = "/v1/chat/completions"
    batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    answer_all(store, peaks, count)
    while batch.status not in ("completed", "failed"):
        peaks.look()
        batch = client.batches.retrieve(batch.id)
    return batch


def test_tens_of_thousands_of_lines_are_held_neither_in_memory_nor_in_redis(
    redis_url: str, store: redis.Redis, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"redis_url": redis_url, "files_dir": str(tmp_path / "files"), "job_concurrency": 0}
    with (
        gateway_process(tmp_path, **settings) as process,
        openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client,
    ):
        few, many = Peaks(process, store), Peaks(process, store)
        for peaks, count in ((few, COUNT // 10), (many, COUNT)):
            batch = run(client, store, tmp_path / "lines.jsonl", peaks, count)
            counts = batch.request_counts
            assert counts is not None and (counts.total, counts.completed, counts.failed) == (count, count, 0)
        assert batch.output_file_id is not None
        output = client.files.content(batch.output_file_id).text.splitlines()
    seen = [json.loads(line)["custom_id"] for line in output]
    assert len(seen) == COUNT and set(seen) == {f"line {index}" for index in range(COUNT)}
    assert many.gateway < few.gateway + 24 and many.redis < few.redis + 4
    assert not list(store.scan_iter("*:job:batch_req_*")) and not list(store.scan_iter("*:open:*"))
