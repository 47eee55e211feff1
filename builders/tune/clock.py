"""The time budget of a tuning run, and the duration of its longest measurement."""

from __future__ import annotations

import time

from deepseek_triton.builders.repository.options import Report


class Clock:
    """Tracks the time budget and reports it as progress. Each measurement runs in its context."""

    def __init__(self, budget_s: float, least_s: float, report: Report) -> None:
        self._start = self._began = time.monotonic()
        self._budget_s, self._report = budget_s, report
        self.longest_s = least_s  # duration of the longest measurement, with the server's start and stop
        self.has_measured = False

    def leaves_room(self, count: int) -> bool:
        """Return whether `count` more measurements, each as long as the longest, fit into the budget."""
        return time.monotonic() - self._start + count * self.longest_s <= self._budget_s

    def measurement(self) -> Clock:
        return self

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self.has_measured = True
        self.longest_s = max(self.longest_s, now - self._began)
        self._report("seconds of the budget", min(int(now - self._start), int(self._budget_s)), int(self._budget_s))
