"""Decides whether a candidate is significantly better than the initial configuration.

The search measures each point once, and the best of many single measurements is often only the luckiest. So the initial
configuration and the best candidates are measured again in rounds, in alternating order, so that changes of the
machine's load affect all of them. Rounds are the paired blocks of the bootstrap in loadtest/intervals.py.

This module takes measurements and returns a decision; it starts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_triton.builders.tune.measurement import Measured, Measurement
from deepseek_triton.builders.tune.options import NUM_CANDIDATES
from deepseek_triton.builders.tune.search import is_within
from deepseek_triton.builders.tune.space import Point
from deepseek_triton.loadtest.intervals import (
    CONFIDENCE,
    P99_LATENCY,
    REQUESTS_PER_S,
    Difference,
    Figures,
    Measure,
    ResampledRun,
    difference,
    interval,
    resample,
)

# A single measurement that misses the limit by no more may be of a point that holds it.
NEAR_LIMIT = 1.25
RESAMPLES = 5000
MEASURES = (REQUESTS_PER_S, P99_LATENCY)


@dataclass(frozen=True)
class ConfidenceInterval:
    """A value over all rounds, with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Confirmed:
    """One configuration, measured in every round.

    requests_per_s and p99_s: over all rounds. gain and delay: their differences from the start's. failure: the reason
    if a measurement failed, else empty.
    """

    point: dict[str, int]
    requests_per_s: ConfidenceInterval | None = None
    p99_s: ConfidenceInterval | None = None
    gain: Difference | None = None
    delay: Difference | None = None
    failure: str = ""


@dataclass(frozen=True)
class Decision:
    """confirmed: the start, then the candidates. verdicts: one for each. winner: None means keep the start."""

    confirmed: list[Confirmed]
    verdicts: list[str]
    winner: Confirmed | None


WINS = "better"


def contenders(measured: Sequence[Measured], start: Point, p99_limit_ms: float) -> list[dict[str, int]]:
    """Return the start and then the candidates to measure again.

    Those within the limit come first, the fastest at the front; then those that missed it by little.
    """
    others = [one for one in measured if one.point != start]
    within = [one for one in others if is_within(one.result, p99_limit_ms)]
    near = [one for one in others if one not in within and is_within(one.result, p99_limit_ms * NEAR_LIMIT)]
    within.sort(key=lambda one: -one.result.throughput)
    near.sort(key=lambda one: one.result.p99_ms)
    return [dict(start), *(one.point for one in [*within, *near][:NUM_CANDIDATES])]


def order(num_contenders: int, round_number: int) -> list[int]:
    """Return the order of measurements in a round, which alternates so that a steady drift cancels out."""
    numbers = list(range(num_contenders))
    return numbers[::-1] if round_number % 2 else numbers


def decide(points: Sequence[Point], rounds: Sequence[Sequence[Measurement]], p99_limit_ms: float) -> Decision:
    """Compare each candidate with the start, which is points[0] and hasn't failed.

    Args:
        rounds: each has a measurement for each point, in the points' order.
    """
    confirmed = _confirm(points, rounds)
    verdicts = [_verdict(one, confirmed[0], p99_limit_ms) for one in confirmed]
    winners = [one for one, verdict in zip(confirmed, verdicts, strict=True) if verdict == WINS]
    return Decision(confirmed, verdicts, max(winners, key=_throughput, default=None))


def _confirm(points: Sequence[Point], rounds: Sequence[Sequence[Measurement]]) -> list[Confirmed]:
    columns = [[row[i] for row in rounds] for i in range(len(points))]
    failures = [next((result.failure for result in column if result.failure), "") for column in columns]
    if failures[0]:
        raise ValueError(f"the start has failed: {failures[0]}")
    runs = {i: _run(column) for i, column in enumerate(columns) if not failures[i]}
    place = {i: k for k, i in enumerate(runs)}
    resampled = resample(list(runs.values()), MEASURES, len(rounds), is_paired=True, num_resamples=RESAMPLES)
    drawn = dict(zip(MEASURES, resampled, strict=True))
    # Bonferroni correction: the confidence holds for all candidates together.
    confidence = 1 - (1 - CONFIDENCE) / max(len(points) - 1, 1)

    def change(measure: Measure, i: int) -> Difference | None:
        if i == 0:
            return None
        pairs = drawn[measure][:, [0, place[i]]]
        return difference(measure, (runs[0], runs[i]), pairs, len(rounds), confidence)

    def figure(measure: Measure, i: int) -> ConfidenceInterval:
        value = measure.of(runs[i].figures, runs[i].seconds)
        low, high = interval(drawn[measure][:, place[i]], len(rounds))
        assert value is not None and low is not None and high is not None, "every round has answers"
        return ConfidenceInterval(value, low, high)

    return [
        Confirmed(dict(point), failure=failures[i])
        if failures[i]
        else Confirmed(
            dict(point),
            requests_per_s=figure(REQUESTS_PER_S, i),
            p99_s=figure(P99_LATENCY, i),
            gain=change(REQUESTS_PER_S, i),
            delay=change(P99_LATENCY, i),
        )
        for i, point in enumerate(points)
    ]


def _verdict(one: Confirmed, start: Confirmed, p99_limit_ms: float) -> str:
    """Return WINS, or the reason why the candidate doesn't win.

    The whole interval of its 99th percentile must be within the limit, and the whole interval of the difference in
    throughput must be above 0. If the start misses the limit, a significantly lower latency suffices too.
    """
    if one.p99_s is None or start.p99_s is None:
        return one.failure
    missed = "" if one.p99_s.high * 1e3 <= p99_limit_ms else "not surely within the limit"
    if one.p99_s.value * 1e3 > p99_limit_ms:
        missed = "over the limit"
    if one.gain is None or one.delay is None:
        return f"the start, {missed}" if missed else "the start"
    if missed:
        return missed
    is_start_slow = start.p99_s.value * 1e3 > p99_limit_ms
    if one.gain.conclusion == "better" or (is_start_slow and one.delay.conclusion == "better"):
        return WINS
    return "worse" if one.gain.conclusion == "worse" else "no difference seen"


def _throughput(one: Confirmed) -> float:
    return one.requests_per_s.value if one.requests_per_s else 0.0


def _run(column: Sequence[Measurement]) -> ResampledRun:
    """Return one configuration's rounds as the blocks of one run."""
    counts = [len(result.latencies_ms) for result in column]
    latency_s = np.concatenate([np.array(result.latencies_ms) / 1e3 for result in column])
    none, zero = np.full(len(latency_s), np.nan), np.zeros(len(latency_s))
    block = np.repeat(np.arange(len(column)), counts)
    return ResampledRun(Figures(block, latency_s, none, none, zero, zero), sum(result.seconds for result in column))
