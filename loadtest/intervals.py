"""Confidence intervals of a run's measures by a block bootstrap.

Blocks of time are resampled, not requests: the latencies of requests in one queue are correlated, and resampling single
requests would make the intervals too narrow. If block i of every run had the same conditions, blocks are resampled in
pairs, and the effect of the conditions cancels out of a difference.

With few blocks a bootstrap's tails are too narrow, as a normal distribution's are compared with Student's t. The
quantiles are moved outward by that difference (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015,
"expanded percentile interval").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
MIN_BLOCKS = 8

Floats = npt.NDArray[np.float64]
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Figures:
    """One run's counted requests, one value each. NaN: the request has no such value; infinite: it failed."""

    block: npt.NDArray[np.int64]
    latency_s: Floats
    first_token_s: Floats
    inter_token_s: Floats
    tokens: Floats  # of complete answers
    failed: Floats  # 0 or 1

    def take(self, indices: npt.NDArray[np.int64]) -> Figures:
        """Return the requests at `indices`."""
        return Figures(*(getattr(self, name)[indices] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Difference:
    """A measure of two runs. `change` and the interval are of b - a; None if failures leave no finite value."""

    name: str
    unit: str
    better: Better
    a: float | None
    b: float | None
    low: float | None
    high: float | None

    @property
    def change(self) -> float | None:
        """b - a."""
        if self.a is None or self.b is None or not (math.isfinite(self.a) and math.isfinite(self.b)):
            return None
        return self.b - self.a

    @property
    def conclusion(self) -> str:
        """The conclusion in words."""
        if self.change is None or self.low is None or self.high is None:
            return "no interval: too few requests, or some failed"
        if self.low <= 0 <= self.high:
            return "the interval includes zero: no difference seen"
        return "better" if (self.change < 0) == (self.better == "lower") else "worse"


@dataclass(frozen=True)
class ResampledRun:
    """A run's counted requests and its duration in seconds."""

    figures: Figures
    seconds: float


@dataclass(frozen=True)
class Measure:
    """A measure: its name, its unit, which direction is better, and its function of requests and seconds.

    num_beyond: for a percentile, the number of slower requests.
    """

    name: str
    unit: str
    better: Better
    of: Callable[[Figures, float], float | None]
    num_beyond: Callable[[Figures], float] | None = None


def _percentile(name: str, field: str, rank: float) -> Measure:
    def values_of(figures: Figures) -> Floats:
        values: Floats = getattr(figures, field)
        return values[~np.isnan(values)]

    def of(figures: Figures, seconds: float) -> float | None:
        values = values_of(figures)
        if not len(values):
            return None
        index = max(math.ceil(rank / 100 * len(values)), 1) - 1
        return float(np.partition(values, index)[index])

    return Measure(name, "s", "lower", of, lambda figures: len(values_of(figures)) * (100 - rank) / 100)


P99_LATENCY = _percentile("latency, 99th percentile", "latency_s", 99)
REQUESTS_PER_S = Measure(
    "complete requests/s", "", "higher", lambda figures, seconds: float((1 - figures.failed).sum() / seconds)
)
MEASURES = (
    _percentile("latency, median", "latency_s", 50),
    P99_LATENCY,
    _percentile("time to first token, median", "first_token_s", 50),
    _percentile("time to first token, 99th percentile", "first_token_s", 99),
    _percentile("inter-token latency, median", "inter_token_s", 50),
    _percentile("inter-token latency, 99th percentile", "inter_token_s", 99),
    REQUESTS_PER_S,
    Measure("output tokens/s", "", "higher", lambda figures, seconds: float(figures.tokens.sum() / seconds)),
    Measure(
        "requests without a complete answer",
        "%",
        "lower",
        lambda figures, seconds: float(figures.failed.mean() * 100) if len(figures.failed) else None,
    ),
)

Resample = tuple[float | None, ...]  # one value for each run


def resample(
    runs: Sequence[ResampledRun],
    measures: Sequence[Measure],
    num_blocks: int,
    *,
    is_paired: bool,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[list[Resample]]:
    """Return each measure's values in `num_resamples` bootstrap samples, indexed [measure][sample][run]."""
    random = np.random.default_rng(seed)
    resampled: list[list[Resample]] = [[] for _ in measures]
    members = [[np.flatnonzero(run.figures.block == i) for i in range(num_blocks)] for run in runs]
    for _ in range(num_resamples):
        first = random.integers(num_blocks, size=num_blocks)
        chosen = [first, *(first if is_paired else random.integers(num_blocks, size=num_blocks) for _ in runs[1:])]
        drawn = [
            run.figures.take(np.concatenate([blocks[i] for i in numbers]))
            for run, blocks, numbers in zip(runs, members, chosen, strict=True)
        ]
        for values, measure in zip(resampled, measures, strict=True):
            values.append(tuple(measure.of(figures, run.seconds) for figures, run in zip(drawn, runs, strict=True)))
    return resampled


def interval(
    values: Sequence[float | None], num_blocks: int, confidence: float = CONFIDENCE
) -> tuple[float | None, float | None]:
    """Return the central interval that holds `confidence` of the values; (None, None) if one is absent or infinite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < len(values) or not finite:
        return None, None
    outside = _tail(num_blocks, confidence)
    low, high = np.quantile(finite, [outside, 1 - outside])
    return float(low), float(high)


def difference(
    measure: Measure,
    runs: tuple[ResampledRun, ResampledRun],
    draws: Sequence[Resample],
    num_blocks: int,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Return the difference of one measure of two runs; `draws` are its bootstrap samples."""
    changes = [None if one is None or other is None else other - one for one, other in draws]
    low, high = interval(changes, num_blocks, confidence)
    a, b = (measure.of(run.figures, run.seconds) for run in runs)
    return Difference(measure.name, measure.unit, measure.better, a, b, low, high)


def _tail(num_blocks: int, confidence: float) -> float:
    """Return the share of samples to exclude at each end."""
    normal, freedom = NormalDist(), max(num_blocks - 1, 1)
    z = normal.inv_cdf((1 + confidence) / 2)
    # Student's quantile, as a series in 1/freedom (Abramowitz & Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return normal.cdf(-t * math.sqrt(num_blocks / freedom))
