"""The engine's own figures: readings of its `deepseek_` metrics in; its batch, queue and latencies out.

Its histograms cover every request; a client's percentiles cover those that streamed. A histogram's mean is exact; of a
percentile only its bucket is known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_triton.loadtest.histogram import HistogramSnapshot
from deepseek_triton.loadtest.metrics import Reading, gauge_course, nearest

FIRST_TOKEN = "deepseek_time_to_first_token_seconds"
INTER_TOKEN = "deepseek_inter_token_latency_seconds"
QUEUE = "deepseek_queue_time_seconds"
SLOTS, SLOTS_USED, WAITING = "deepseek_slots", "deepseek_slots_used", "deepseek_sequences_waiting"
TOKENS = "deepseek_generated_tokens"  # counters are named without their ending `_total`
# How requests ended: name → counter.
OUTCOMES = {
    "accepted": "deepseek_requests",
    "cancelled": "deepseek_requests_cancelled",
    "failed": "deepseek_requests_failed",
    "refused": "deepseek_requests_refused",
    "expired": "deepseek_requests_expired",
}
NOTHING = HistogramSnapshot((math.inf,), (0.0,), 0.0)


def is_engine(part: str, model: str) -> bool:
    """Whether the Triton model `part` is the engine of the served `model`."""
    return part == f"{model}-engine"


@dataclass(frozen=True)
class Spread:
    """A histogram in seconds. A percentile lies above the first of its two bounds and is at most the second."""

    count: float
    mean: float | None
    p50: tuple[float, float] | None
    p99: tuple[float, float] | None

    @classmethod
    def of(cls, histogram: HistogramSnapshot) -> Spread:
        """Summarise a histogram."""
        return cls(histogram.count, histogram.mean, histogram.bucket(50), histogram.bucket(99))


@dataclass(frozen=True)
class EngineWork:
    """The engine's work in a period."""

    outcomes: dict[str, float]
    tokens: float
    first_token_s: Spread  # from a request's arrival in the engine
    inter_token_s: Spread  # between two tokens of a sequence
    queue_s: float | None  # mean, from arrival to a slot
    prefill_s: float | None  # mean, from the slot to the first token
    decode_s: float | None  # mean, from the first token to the last
    slots: float
    max_slots_used: float  # the largest reading; there is one each second
    max_waiting: float


def work(readings: Sequence[Reading], model: str) -> EngineWork | None:
    """The engine's work between the first reading and the last; None: the model publishes no such metrics."""
    if not readings or FIRST_TOKEN not in readings[-1].histograms.get(model, {}):
        return None
    before, after = readings[0], readings[-1]
    first, inter, queue = (_between(before, after, model, name) for name in (FIRST_TOKEN, INTER_TOKEN, QUEUE))
    queue_s = queue.mean
    return EngineWork(
        outcomes={name: _increase(before, after, model, counter) for name, counter in OUTCOMES.items()},
        tokens=_increase(before, after, model, TOKENS),
        first_token_s=Spread.of(first),
        inter_token_s=Spread.of(inter),
        queue_s=queue_s,
        prefill_s=_prefill(first, queue),
        decode_s=inter.total / first.count if first.count else None,
        slots=_gauge(after, model, SLOTS),
        max_slots_used=max(_gauge(reading, model, SLOTS_USED) for reading in readings),
        max_waiting=max(_gauge(reading, model, WAITING) for reading in readings),
    )


@dataclass(frozen=True)
class EngineCourse:
    """The engine's work, one value for each step of the run. Percentiles are estimated within their buckets."""

    slots_used: list[float | None]  # average
    waiting: list[float | None]
    tokens_per_s: list[float | None]
    first_token_p50_s: list[float | None]
    first_token_p99_s: list[float | None]
    inter_token_p50_s: list[float | None]
    inter_token_p99_s: list[float | None]
    queue_s: list[float | None]  # these three: means of the step's requests
    prefill_s: list[float | None]
    decode_s: list[float | None]


def course(readings: Sequence[Reading], model: str, edges: Sequence[float]) -> EngineCourse | None:
    """The engine's work between the edges (seconds); None: the model publishes no such metrics."""
    if work(readings, model) is None:
        return None
    steps = list(itertools.pairwise(nearest(readings, edges)))
    first, inter, queue = (
        [_between(before, after, model, name) for before, after in steps] for name in (FIRST_TOKEN, INTER_TOKEN, QUEUE)
    )
    return EngineCourse(
        slots_used=gauge_course(readings, model, SLOTS_USED, edges),
        waiting=gauge_course(readings, model, WAITING, edges),
        tokens_per_s=[
            _increase(before, after, model, TOKENS) / (after.at_s - before.at_s) if after.at_s > before.at_s else None
            for before, after in steps
        ],
        first_token_p50_s=[each.estimate(50) for each in first],
        first_token_p99_s=[each.estimate(99) for each in first],
        inter_token_p50_s=[each.estimate(50) for each in inter],
        inter_token_p99_s=[each.estimate(99) for each in inter],
        queue_s=[each.mean for each in queue],
        prefill_s=[_prefill(a, b) for a, b in zip(first, queue, strict=True)],
        decode_s=[b.total / a.count if a.count else None for a, b in zip(first, inter, strict=True)],
    )


def _prefill(first: HistogramSnapshot, queue: HistogramSnapshot) -> float | None:
    """The difference of the two means. In a short step they may cover different requests; then it is at least 0."""
    return max(first.mean - queue.mean, 0.0) if first.mean is not None and queue.mean is not None else None


def _between(before: Reading, after: Reading, model: str, name: str) -> HistogramSnapshot:
    return after.histograms.get(model, {}).get(name, NOTHING).since(before.histograms.get(model, {}).get(name))


def _increase(before: Reading, after: Reading, model: str, name: str) -> float:
    return after.own_counters.get(model, {}).get(name, 0.0) - before.own_counters.get(model, {}).get(name, 0.0)


def _gauge(reading: Reading, model: str, name: str) -> float:
    return reading.gauges.get(model, {}).get(name, 0.0)
