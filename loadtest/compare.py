"""Computes the differences between two results, with confidence intervals (loadtest/intervals.py).

If both runs are of one open-loop profile, each block of time has the same arrivals in both runs. Blocks are then
resampled in pairs, so that the effect of the schedule, such as a spike, cancels out. Otherwise each run's blocks are
resampled independently.

An interval covers the random variation within the two runs. It doesn't cover other load on the machine during one of
them; only more runs can separate that from a change of the software.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_triton.loadtest.intervals import (
    CONFIDENCE,
    MEASURES,
    MIN_BLOCKS,
    NUM_RESAMPLES,
    Difference,
    Figures,
    Floats,
    Measure,
    ResampledRun,
    difference,
    resample,
)
from deepseek_triton.loadtest.measure import counted, percentile
from deepseek_triton.loadtest.result import LoadTestResult
from deepseek_triton.loadtest.sample import Sample
from deepseek_triton.loadtest.verdict import amount

BLOCK_S = 5.0  # longer than most answers take to come
# Requests slower than a percentile. In simulated queues, 60 % and 85 % busy, what calls itself a 95 % interval held the
# truth of two alike runs' 99th percentiles 86 and 52 times of 100 with 1.4 of them, 92 and 81 times with 6.
MIN_BEYOND = 5


@dataclass(frozen=True)
class Comparison:
    """The differences, and the parameters of the intervals."""

    differences: list[Difference]
    num_blocks: int
    block_s: float
    is_paired: bool

    @property
    def has_intervals(self) -> bool:
        """Whether there are enough blocks for confidence intervals."""
        return self.num_blocks >= MIN_BLOCKS


def compare(a: LoadTestResult, b: LoadTestResult, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Comparison:
    """Return the difference b - a of each measure. A request belongs to the block in which it was due."""
    is_paired = a.profile.load == b.profile.load and a.profile.arrivals == "open"
    num_blocks = _num_blocks(a, b)
    runs = _run(a, num_blocks), _run(b, num_blocks)
    drawn = resample(runs, MEASURES, num_blocks, is_paired=is_paired, num_resamples=num_resamples, seed=seed)
    differences = [_difference(m, runs, draws, num_blocks) for m, draws in zip(MEASURES, drawn, strict=True)]
    return Comparison(differences, num_blocks, a.profile.duration_s / num_blocks, is_paired)


def _difference(
    measure: Measure, runs: tuple[ResampledRun, ResampledRun], draws: Floats, num_blocks: int
) -> Difference:
    """Return the difference; without an interval if there are too few blocks or requests above a percentile."""
    found = difference(measure, runs, draws, num_blocks)
    is_thin = measure.num_beyond is not None and any(measure.num_beyond(run.figures) < MIN_BEYOND for run in runs)
    return dataclasses.replace(found, low=None, high=None) if num_blocks < MIN_BLOCKS or is_thin else found


def _num_blocks(a: LoadTestResult, b: LoadTestResult) -> int:
    """Return the number of blocks, of about BLOCK_S each and none shorter than the 90th percentile of the latency.

    Blocks longer than nearly all requests are almost independent of each other.
    """
    seconds = min(a.profile.duration_s, b.profile.duration_s)
    num_blocks = max(MIN_BLOCKS, round(seconds / BLOCK_S))
    for run in (a, b):
        slow = percentile([sample.latency_s for sample in counted(run.samples) if sample.is_complete], 90)
        num_blocks = min(num_blocks, int(seconds / slow)) if slow else num_blocks
    return max(num_blocks, 1)


def _run(result: LoadTestResult, num_blocks: int) -> ResampledRun:
    seconds = result.profile.duration_s
    return ResampledRun(figures_of(result.samples, seconds, num_blocks), seconds)


def figures_of(samples: Sequence[Sample], duration_s: float, num_blocks: int) -> Figures:
    """The arrays of a run's counted requests."""
    kept = counted(samples)

    def column(values: Sequence[float | None], streams_only: bool) -> Floats:
        rows = zip(kept, values, strict=True)
        return np.array(
            [
                (math.inf if sample.is_streamed or not streams_only else math.nan)
                if not sample.is_complete
                else math.nan
                if value is None
                else value
                for sample, value in rows
            ],
            dtype=np.float64,
        )

    return Figures(
        block=np.array([min(int(s.due_s / duration_s * num_blocks), num_blocks - 1) for s in kept], dtype=np.int64),
        latency_s=column([s.latency_s for s in kept], streams_only=False),
        first_token_s=column([s.first_token_s for s in kept], streams_only=True),
        inter_token_s=column([s.inter_token_s for s in kept], streams_only=True),
        tokens=np.array([s.num_output_tokens * s.is_complete for s in kept], dtype=np.float64),
        failed=np.array([not s.is_complete for s in kept], dtype=np.float64),
    )


def table(a: LoadTestResult, b: LoadTestResult, comparison: Comparison) -> str:
    """The differences as text, after whatever speaks against the comparison."""
    lines = [f"{name}: {run.profile.name}, {run.target.model}, {run.started}" for name, run in (("a", a), ("b", b))]
    lines += [f"beware: {warning}" for warning in warnings(a, b)]
    drawn = "the same of both runs" if comparison.is_paired else "of each run by itself"
    if comparison.has_intervals:
        how = f"{CONFIDENCE:.0%} intervals of b - a, from {comparison.num_blocks} blocks of time, drawn {drawn}"
    else:
        how = (
            f"no intervals: answers take so long that {comparison.num_blocks} stretches of {comparison.block_s:.0f} s "
            f"are all there is, and {MIN_BLOCKS} are needed: one long wait is one event. Compare longer runs"
        )
    lines += [how, "", f"{'':38}{'a':>10}{'b':>10}{'b - a':>11}{'change':>9}   {'interval':24}".rstrip()]
    for each in comparison.differences:
        change = each.change
        percent = f"{change / each.a:+.1%}" if change is not None and each.a else ""
        conclusion = each.conclusion if comparison.has_intervals else ""
        figures = f"{each.name:38}{amount(each.a, each.unit):>10}{amount(each.b, each.unit):>10}"
        changes = f"{_signed(change, each.unit):>11}{percent:>9}   {_bounds(each):24}{conclusion}"
        lines.append((figures + changes).rstrip())
    lines += [
        "",
        "An interval covers chance within these two runs; whether the machine was busier, only more runs tell.",
    ]
    return "\n".join(lines)


def warnings(a: LoadTestResult, b: LoadTestResult) -> list[str]:
    """What makes two runs no fair comparison."""
    found = [f"run {name} is invalid" for name, result in (("a", a), ("b", b)) if not result.is_valid]
    if a.profile.load != b.profile.load:
        found.append("the profiles differ, so the loads did")
    for key in ("processor", "cores", "memory_gib"):
        if a.machine.get(key) != b.machine.get(key):
            found.append(f"{key} differs: {a.machine.get(key)} and {b.machine.get(key)}")
    return found


def _signed(value: float | None, unit: str) -> str:
    if value is None:
        return "none"
    return f"{'+' if value > 0 else ''}{amount(value, unit)}"


def _bounds(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return "none"
    return f"{_signed(difference.low, difference.unit)} to {_signed(difference.high, difference.unit)}"
