"""Locust users of a served model: streamed answers over HTTP, time to first token beside the whole time.

    locust -f loadtest/locustfile.py --headless -u 8 -r 8 -t 30s --host http://localhost:8000
MODEL names the served model (default: smollm2). An answer that breaks off counts as a failure.
"""

from __future__ import annotations

import os
import random
import time

from locust import User, constant, task

from clients.api import GenerateRequest
from clients.errors import ClientError
from clients.http import HttpClient

SUBJECTS = ("rivers", "bread", "prime numbers", "the sea", "winter", "a cat", "Paris", "music")


class StreamingUser(User):
    """Asks one question after another."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Connect to --host."""
        self._client = HttpClient(self.host or "http://localhost:8000", os.environ.get("MODEL", "smollm2"))

    def on_stop(self) -> None:
        """Disconnect."""
        self._client.close()

    @task
    def stream(self) -> None:
        """Stream one answer of up to 64 tokens."""
        prompt = f"A short text about {random.choice(SUBJECTS)}:"
        start, first, num_bytes, error = time.perf_counter(), None, 0, None
        try:
            for chunk in self._client.stream(GenerateRequest(prompt=prompt, max_tokens=64)):
                first = first or time.perf_counter()
                num_bytes += len(chunk.text.encode())
        except ClientError as failure:
            error = failure
        if first is not None:
            self._record("time to first token", first - start, 0, None)
        self._record("whole answer", time.perf_counter() - start, num_bytes, error)

    def _record(self, name: str, seconds: float, num_bytes: int, error: ClientError | None) -> None:
        self.environment.events.request.fire(
            request_type="stream", name=name, response_time=seconds * 1e3, response_length=num_bytes, exception=error
        )
