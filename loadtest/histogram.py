"""Means and percentiles of a Prometheus histogram with cumulative buckets."""

from __future__ import annotations

import bisect
import math
import operator
from dataclasses import dataclass


@dataclass(frozen=True)
class HistogramSnapshot:
    """The observations up to a reading, or between two readings."""

    bounds: tuple[float, ...]  # growing; the last is infinite
    counts: tuple[float, ...]  # observations of at most each bound
    total: float  # sum of all observations

    def __post_init__(self) -> None:
        """Validate bounds and counts."""
        if len(self.bounds) != len(self.counts) or not self.bounds or self.bounds[-1] != math.inf:
            raise ValueError(f"a histogram needs a count for each bound, the last of them infinite, got {self.bounds}")
        if list(self.bounds) != sorted(self.bounds):
            raise ValueError(f"a histogram's bounds must grow, got {self.bounds}")

    def since(self, earlier: HistogramSnapshot | None) -> HistogramSnapshot:
        """Return the observations since an earlier reading; all if there is none or the server has restarted."""
        if earlier is None or earlier.bounds != self.bounds or any(map(operator.gt, earlier.counts, self.counts)):
            return self
        counts = tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True))
        return HistogramSnapshot(self.bounds, counts, self.total - earlier.total)

    @property
    def count(self) -> float:
        """Number of observations."""
        return self.counts[-1]

    @property
    def mean(self) -> float | None:
        """The exact mean: sum divided by count."""
        return self.total / self.count if self.count > 0 else None

    def bucket(self, rank: float) -> tuple[float, float] | None:
        """Return the bucket (low, high] that holds the nearest-rank percentile; None without observations."""
        if self.count <= 0:
            return None
        index = bisect.bisect_left(self.counts, max(math.ceil(rank / 100 * self.count), 1))
        return (self.bounds[index - 1] if index else 0.0), self.bounds[index]

    def estimate(self, rank: float) -> float | None:
        """Return the percentile by linear interpolation in its bucket; at most the last finite bound."""
        bucket = self.bucket(rank)
        if bucket is None:
            return None
        low, high = bucket
        if math.isinf(high):
            return low
        index = self.bounds.index(high)
        before = self.counts[index - 1] if index else 0.0
        part = (rank / 100 * self.count - before) / (self.counts[index] - before)
        return min(max(low + (high - low) * part, low), high)
