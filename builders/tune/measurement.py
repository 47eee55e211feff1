"""The result of one measurement of one configuration: latencies, throughput and percentiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    latencies_ms: of the requests answered within `seconds`. failure: the reason if the measurement failed, else empty.
    """

    latencies_ms: tuple[float, ...] = ()
    seconds: float = 0.0
    failure: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Read the values of `to_dict`; raises ValueError, KeyError or TypeError."""
        latencies = tuple(float(latency) for latency in values["latencies_ms"])
        result = cls(latencies, float(values["seconds"]), str(values["failure"]))
        if bool(result.failure) == bool(latencies) or (latencies and result.seconds <= 0):
            raise ValueError("a measurement has latencies and the seconds that they took, or a failure")
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON values."""
        return {"latencies_ms": list(self.latencies_ms), "seconds": self.seconds, "failure": self.failure}

    @property
    def throughput(self) -> float:
        """Requests/s."""
        return len(self.latencies_ms) / self.seconds if self.seconds else 0.0

    def percentile_ms(self, rank: float) -> float:
        """Return the nearest-rank percentile of the latencies; 0 if there are none."""
        ordered = sorted(self.latencies_ms)
        return ordered[max(math.ceil(rank / 100 * len(ordered)), 1) - 1] if ordered else 0.0

    @property
    def p50_ms(self) -> float:
        """The median latency."""
        return self.percentile_ms(50)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the latency."""
        return self.percentile_ms(99)


@dataclass(frozen=True)
class Measured:
    """A point and its measurement."""

    point: dict[str, int]
    result: Measurement
