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
Integers = npt.NDArray[np.int64]
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Figures:
    """One run's counted requests, one value each. NaN: the request has no such value; infinite: it failed."""

    block: Integers
    latency_s: Floats
    first_token_s: Floats
    inter_token_s: Floats
    tokens: Floats  # of complete answers
    failed: Floats  # 0 or 1


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
    """A measure: its name, its unit, which direction is better, and its function of requests, seconds and samples.

    of_samples: of a run's requests, its seconds, and how often each sample has each block [samples, blocks], the
        measure of each sample; NaN where it has none.
    num_beyond: for a percentile, the number of slower requests.
    """

    name: str
    unit: str
    better: Better
    of_samples: Callable[[Figures, float, Integers], Floats]
    num_beyond: Callable[[Figures], float] | None = None

    def of(self, figures: Figures, seconds: float) -> float | None:
        """The measure of the run itself: of each block once."""
        once = np.ones((1, int(figures.block.max(initial=0)) + 1), np.int64)
        value = float(self.of_samples(figures, seconds, once)[0])
        return None if math.isnan(value) else value


def _percentile(name: str, field: str, rank: float) -> Measure:
    def values_of(figures: Figures) -> Floats:
        values: Floats = getattr(figures, field)
        return values[~np.isnan(values)]

    def of_samples(figures: Figures, seconds: float, counts: Integers) -> Floats:
        block = figures.block[~np.isnan(getattr(figures, field))]
        return _percentiles(values_of(figures), block, counts, rank)

    return Measure(name, "s", "lower", of_samples, lambda figures: len(values_of(figures)) * (100 - rank) / 100)


def _percentiles(values: Floats, block: Integers, counts: Integers, rank: float) -> Floats:
    """Return the nearest-rank percentile of each sample [samples]; `counts` is [samples, blocks].

    One binary search in the sorted values finds all samples' percentiles: how many values a sample has up to one of
    them is the sum of how many each of its blocks has.
    """
    num_samples, num_blocks = counts.shape
    if not len(values):
        return np.full(num_samples, math.nan)
    order = np.argsort(values)
    places = [np.flatnonzero(block[order] == i) for i in range(num_blocks)]  # ascending, in the sorted values
    totals = counts @ np.array([len(each) for each in places])
    wanted = np.maximum(np.ceil(rank / 100 * totals), 1)
    low, high = np.zeros(num_samples, np.int64), np.full(num_samples, len(values) - 1, np.int64)
    for _ in range(len(values).bit_length()):
        middle = (low + high) // 2
        found = sum(counts[:, i] * np.searchsorted(each, middle, side="right") for i, each in enumerate(places))
        low, high = np.where(found >= wanted, (low, middle), (np.minimum(middle + 1, high), high))
    return np.where(totals > 0, values[order][high], math.nan)


def _sums(values: Floats, figures: Figures, counts: Integers) -> Floats:
    """The sum over each sample's requests [samples]."""
    of_blocks: Floats = np.bincount(figures.block, values, counts.shape[1]).astype(np.float64)
    return counts @ of_blocks


def _shares(values: Floats, figures: Figures, counts: Integers) -> Floats:
    """The mean over each sample's requests [samples]; NaN where it has none."""
    num_requests = _sums(np.ones(len(values)), figures, counts)
    return np.where(num_requests > 0, _sums(values, figures, counts) / np.maximum(num_requests, 1), math.nan)


P99_LATENCY = _percentile("latency, 99th percentile", "latency_s", 99)
REQUESTS_PER_S = Measure(
    "complete requests/s",
    "",
    "higher",
    lambda figures, seconds, counts: _sums(1 - figures.failed, figures, counts) / seconds,
)
MEASURES = (
    _percentile("latency, median", "latency_s", 50),
    P99_LATENCY,
    _percentile("time to first token, median", "first_token_s", 50),
    _percentile("time to first token, 99th percentile", "first_token_s", 99),
    _percentile("inter-token latency, median", "inter_token_s", 50),
    _percentile("inter-token latency, 99th percentile", "inter_token_s", 99),
    REQUESTS_PER_S,
    Measure(
        "output tokens/s",
        "",
        "higher",
        lambda figures, seconds, counts: _sums(figures.tokens, figures, counts) / seconds,
    ),
    Measure(
        "requests without a complete answer",
        "%",
        "lower",
        lambda figures, seconds, counts: _shares(figures.failed, figures, counts) * 100,
    ),
)


def resample(
    runs: Sequence[ResampledRun],
    measures: Sequence[Measure],
    num_blocks: int,
    *,
    is_paired: bool,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Floats]:
    """Return each measure's values in `num_resamples` bootstrap samples [samples, runs]; NaN where there is none."""
    random = np.random.default_rng(seed)
    num_draws = num_resamples * (1 if is_paired else len(runs))
    drawn = random.integers(num_blocks, size=(num_draws, num_blocks))
    flat = (drawn + num_blocks * np.arange(num_draws)[:, None]).reshape(-1)
    counts = np.bincount(flat, minlength=drawn.size).reshape(num_resamples, -1, num_blocks)
    counts = np.broadcast_to(counts, (num_resamples, len(runs), num_blocks))
    return [
        np.stack([measure.of_samples(run.figures, run.seconds, counts[:, i]) for i, run in enumerate(runs)], axis=1)
        for measure in measures
    ]


def interval(
    values: Sequence[float | None] | Floats, num_blocks: int, confidence: float = CONFIDENCE
) -> tuple[float | None, float | None]:
    """Return the central interval that holds `confidence` of the values; (None, None) if one is absent or infinite."""
    numbers = np.asarray(values, np.float64)  # None becomes NaN
    if not len(numbers) or not np.isfinite(numbers).all():
        return None, None
    outside = _tail(num_blocks, confidence)
    low, high = np.quantile(numbers, [outside, 1 - outside])
    return float(low), float(high)


def difference(
    measure: Measure,
    runs: tuple[ResampledRun, ResampledRun],
    draws: Floats,
    num_blocks: int,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Return the difference of one measure of two runs; `draws` [samples, 2] are its bootstrap samples."""
    with np.errstate(invalid="ignore"):  # infinite - infinite is NaN: no interval
        changes = draws[:, 1] - draws[:, 0]
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
