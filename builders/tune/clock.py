"""The time that tuning may take, and what a measurement has taken so far."""

from __future__ import annotations

import time

from deepseek_triton.builders.repository.options import Report


class Clock:
    """The budget, as a progress bar too; a context for each measurement."""

    def __init__(self, budget_s: float, least_s: float, report: Report) -> None:
        self._start = self._began = time.monotonic()
        self._budget_s, self._report = budget_s, report
        self.longest_s = least_s  # of a measurement, its server's start and end included
        self.has_measured = False

    def leaves_room(self, count: int) -> bool:
        """Whether so many measurements, each as long as the longest, would still end in time."""
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
