"""Computes a run's percentiles, rates and time series from its samples. Times are in seconds.

Percentiles use the nearest rank, without interpolation. A request without a complete answer counts as infinitely slow,
so that a server can't improve its latency by failing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_triton.loadtest.sample import Sample

PERCENTILES = (50, 90, 99)
# Possible step widths of the time series, in seconds; the first that gives at most MAX_STEPS steps is used.
STEPS_S = (1, 2, 5, 10, 30, 60, 300, 1800)
MAX_STEPS = 36


@dataclass(frozen=True)
class Distribution:
    """The distribution of one value over requests. An infinite percentile falls among failed requests."""

    count: int  # values that were measured
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True)
class Backlog:
    """The peak number of due requests whose answer hadn't begun, and the contiguous time around it with any."""

    peak: int
    began_s: float
    peak_s: float  # when the peak was first reached
    gone_s: float  # when no request waited any more

    @property
    def lasted_s(self) -> float:
        """Duration of the backlog in seconds."""
        return self.gone_s - self.began_s


@dataclass(frozen=True)
class Summary:
    """The results of a run, or of one protocol's requests in it, without the warm-up."""

    num_requests: int
    num_complete: int
    num_errors: int  # with an error
    num_incomplete: int  # without an error, but without a proper end
    error_ratio: float  # errors and incomplete answers, of all
    latency_s: Distribution
    first_token_s: Distribution
    inter_token_s: Distribution
    max_gap_s: Distribution
    requests_per_s: float  # complete answers
    output_tokens_per_s: float  # of complete answers
    stream_tokens_per_s: Distribution  # of one stream, after its first token
    input_tokens: Distribution
    output_tokens: Distribution
    backlog: Backlog


def percentile(values: Sequence[float], rank: float, num_failed: int = 0) -> float | None:
    """Return the nearest-rank percentile of `values` and `num_failed` infinite ones; None if there are none."""
    total = len(values) + num_failed
    if not total:
        return None
    index = max(math.ceil(rank / 100 * total), 1) - 1
    return float(np.partition(values, index)[index]) if index < len(values) else math.inf


def distribution(values: Iterable[float | None], num_failed: int = 0) -> Distribution:
    """Return the distribution of the values that aren't None."""
    present = [value for value in values if value is not None]
    p50, p90, p99 = (percentile(present, rank, num_failed) for rank in PERCENTILES)
    return Distribution(
        count=len(present),
        mean=float(np.mean(present)) if present else None,
        p50=p50,
        p90=p90,
        p99=p99,
        max=percentile(present, 100, num_failed),
    )


def counted(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples that were due after the warm-up."""
    return [sample for sample in samples if sample.due_s >= 0]


def summarise(samples: Sequence[Sample], duration_s: float) -> Summary:
    """Summarise `samples`, all of which count. Rates are over the time from 0 to the end of the last answer."""
    complete = [sample for sample in samples if sample.is_complete]
    failed = [sample for sample in samples if not sample.is_complete]
    failed_streams = sum(sample.is_streamed for sample in failed)
    # Answers to the last requests may end after the duration.
    seconds = max([duration_s, *(sample.end_s for sample in complete)])
    rates = [1 / wait if (wait := sample.inter_token_s) else None for sample in complete]
    return Summary(
        num_requests=len(samples),
        num_complete=len(complete),
        num_errors=sum(bool(sample.error) for sample in samples),
        num_incomplete=sum(not sample.error for sample in failed),
        error_ratio=len(failed) / len(samples) if samples else 0.0,
        latency_s=distribution((sample.latency_s for sample in complete), len(failed)),
        first_token_s=distribution((sample.first_token_s for sample in complete), failed_streams),
        inter_token_s=distribution((sample.inter_token_s for sample in complete), failed_streams),
        max_gap_s=distribution((sample.max_gap_s for sample in complete if sample.is_streamed), failed_streams),
        requests_per_s=len(complete) / seconds,
        output_tokens_per_s=sum(sample.num_output_tokens for sample in complete) / seconds,
        stream_tokens_per_s=distribution(rates),
        input_tokens=distribution(sample.num_input_tokens for sample in complete),
        output_tokens=distribution(sample.num_output_tokens for sample in complete),
        backlog=backlog(waiting(samples)),
    )


Interval = tuple[float, float]


def waiting(samples: Iterable[Sample]) -> list[Interval]:
    """Return each request's waiting time as (start, end): from due to its first response or its error."""
    return [(sample.due_s, sample.end_s if sample.first_s is None else sample.first_s) for sample in samples]


def answering(samples: Iterable[Sample]) -> list[Interval]:
    """Return each stream's (start, end): from its first response to its last."""
    return [(sample.first_s, sample.end_s) for sample in samples if sample.first_s is not None]


def backlog(intervals: Iterable[Interval]) -> Backlog:
    """Return the backlog: the maximum number of intervals that overlap. Intervals that only touch don't overlap."""
    changes = sorted(change for start, end in intervals if end > start for change in ((start, 1), (end, -1)))
    depth, began, longest = 0, 0.0, Backlog(0, 0.0, 0.0, 0.0)
    for at, step in changes:
        began = at if depth == 0 else began
        depth += step
        if depth > longest.peak:
            longest = Backlog(depth, began, at, math.inf)
        elif depth == 0 and math.isinf(longest.gone_s):
            longest = dataclasses.replace(longest, gone_s=at)
    return longest


def mean_depth(intervals: Iterable[Interval], edges: Sequence[float]) -> list[float]:
    """Return the mean number of overlapping intervals between each two of `edges`."""
    covered = np.zeros(len(edges) - 1)
    lows, highs = np.asarray(edges[:-1], float), np.asarray(edges[1:], float)
    for start, end in intervals:
        covered += np.clip(np.minimum(highs, end) - np.maximum(lows, start), 0, None)
    return [float(value) for value in covered / (highs - lows)]


def course_edges(start_s: float, end_s: float) -> list[float]:
    """Return the edges of equal steps from the start of the warm-up to the end; one edge is 0."""
    step = next((step for step in STEPS_S if (end_s - start_s) / step <= MAX_STEPS), STEPS_S[-1])
    first = -math.ceil(-start_s / step)
    return [float(step * i) for i in range(first, max(math.ceil(end_s / step), first + 1) + 1)]


@dataclass(frozen=True)
class Course:
    """The time series of a run, with all requests and the warm-up. `edges` has one value more than the others."""

    edges: list[float]
    due_per_s: list[float]
    complete_per_s: list[float]
    failed_per_s: list[float]
    tokens_per_s: list[float]
    latency_p50_s: list[float | None]  # of the requests due in the step, as the following
    latency_p90_s: list[float | None]
    latency_p99_s: list[float | None]
    first_token_p50_s: list[float | None]
    first_token_p99_s: list[float | None]
    inter_token_p50_s: list[float | None]  # of the streams' own averages
    inter_token_p99_s: list[float | None]
    waiting: list[float]  # requests due whose answer hasn't begun, on average
    answering: list[float]  # streams under way, on average


def course(samples: Sequence[Sample], tokens: Mapping[int, int], edges: list[float]) -> Course:
    """Return the time series of a run; `tokens` has the number of tokens received in each whole second."""

    def rate(times: Iterable[float], weights: Sequence[float] | None = None) -> list[float]:
        counts, _ = np.histogram(list(times), edges, weights=weights)
        return [float(value) for value in counts / np.diff(edges)]

    def spread(rank: float, figure: Callable[[Sample], float | None]) -> list[float | None]:
        values = []
        for low, high in itertools.pairwise(edges):
            due = [sample for sample in samples if low <= sample.due_s < high]
            figures = [value for sample in due if sample.is_complete and (value := figure(sample)) is not None]
            values.append(percentile(figures, rank))
        return values

    complete = [sample for sample in samples if sample.is_complete]
    return Course(
        edges=edges,
        due_per_s=rate(sample.due_s for sample in samples),
        complete_per_s=rate(sample.end_s for sample in complete),
        failed_per_s=rate(sample.end_s for sample in samples if not sample.is_complete),
        tokens_per_s=rate((second + 0.5 for second in tokens), list(tokens.values())),
        latency_p50_s=spread(50, lambda sample: sample.latency_s),
        latency_p90_s=spread(90, lambda sample: sample.latency_s),
        latency_p99_s=spread(99, lambda sample: sample.latency_s),
        first_token_p50_s=spread(50, lambda sample: sample.first_token_s),
        first_token_p99_s=spread(99, lambda sample: sample.first_token_s),
        inter_token_p50_s=spread(50, lambda sample: sample.inter_token_s),
        inter_token_p99_s=spread(99, lambda sample: sample.inter_token_s),
        waiting=mean_depth(waiting(samples), edges),
        answering=mean_depth(answering(samples), edges),
    )
