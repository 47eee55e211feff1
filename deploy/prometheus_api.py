"""The few calls of Prometheus' HTTP API that a panel's data needs."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

Points = list[tuple[float, float]]  # Unix time in seconds, value


@dataclass(frozen=True)
class Line:
    """One series of a query's answer."""

    labels: dict[str, str]
    points: Points


@dataclass(frozen=True)
class Prometheus:
    """A server at `url`."""

    url: str

    def wait_until_ready(self, limit_s: float) -> None:
        """Wait until it answers.

        Raises:
            TimeoutError: it didn't within limit_s.
        """
        deadline = time.monotonic() + limit_s
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                    return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no Prometheus at {self.url} within {limit_s} s: {error}") from error
                time.sleep(0.1)

    def lines(self, query: str, seconds: float, step_s: float) -> list[Line]:
        """What a panel with this query shows of the last `seconds`; Grafana's variables are filled in.

        Raises:
            ValueError: Prometheus refuses the query.
        """
        window = f"{max(4, round(4 * step_s))}s"  # as Grafana: four scrapes
        query = query.replace("$__rate_interval", window).replace("$model", ".*")
        end = time.time()
        words = {"query": query, "start": end - seconds, "end": end, "step": step_s}
        data = urllib.parse.urlencode(words).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query_range", data, timeout=30) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{query}: {error.read().decode(errors='replace')}") from error
        return [
            Line(found["metric"], [(float(at), float(value)) for at, value in found["values"]])
            for found in answer["data"]["result"]
        ]
