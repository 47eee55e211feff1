"""Measurements made by hand, and configurations that respond to load as a function says."""

from __future__ import annotations

from builders.tune.measurement import Measurement

SECONDS = 10.0


def found(throughput: float, p99_ms: float = 10.0, failure: str = "") -> Measurement:
    """So many requests/s, 2 in 100 of them as slow as `p99_ms`, the others half as slow."""
    if failure:
        return Measurement(failure=failure)
    count = max(round(throughput * SECONDS), 1)
    slow = -(-count // 50)
    return Measurement((p99_ms / 2,) * (count - slow) + (p99_ms,) * slow, SECONDS)
