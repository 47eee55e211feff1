"""Where the time of loading goes, for the log."""

from __future__ import annotations

import time


class LoadTimes:
    """The seconds of each stage, one after the other."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._stages: dict[str, float] = {}

    def ended(self, stage: str) -> None:
        """`stage` has just ended; it began when the last one ended."""
        now = time.perf_counter()
        self._stages[stage], self._last = now - self._last, now

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._stages.items())
        return f"{sum(self._stages.values()):.1f} s: {stages}"
