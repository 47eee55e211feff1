"""`deepseek-triton compare a.json b.json`: two results in, their differences with confidence intervals out.

The intervals are bootstrapped over blocks of time, not over requests: requests that queue behind one another are slow
together, and resampling them one by one would count each as news of its own and make the intervals too narrow. Where
both runs are of one open-loop profile, the same arrivals fall in the same block of both, so blocks are drawn in pairs:
what the schedule did to a block, a spike for one, then cancels out. Else each run's blocks are drawn by themselves.

What an interval covers is chance within the two runs. A machine that was busier during one of them is no chance but a
difference, and only more runs tell it from the software's.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from loadtest.measure import counted, percentile
from loadtest.result import Result, ResultError, load
from loadtest.sample import Sample
from loadtest.verdict import amount

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
BLOCK_S = 5.0  # longer than most answers take to come
MIN_BLOCKS = 8

Floats = npt.NDArray[np.float64]
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Figures:
    """One run's counted requests, a value each; NaN: the request has no such figure, infinite: it failed."""

    block: npt.NDArray[np.int64]
    latency_s: Floats
    first_token_s: Floats
    inter_token_s: Floats
    tokens: Floats  # of complete answers
    failed: Floats  # 0 or 1

    def take(self, indices: npt.NDArray[np.int64]) -> Figures:
        """The requests at `indices`."""
        return Figures(*(getattr(self, name)[indices] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Difference:
    """One figure of two runs; `change` and the interval are of b - a, None where failures leave nothing."""

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
        """What may be said."""
        if self.change is None or self.low is None or self.high is None:
            return "no interval: too few requests, or some failed"
        if self.low <= 0 <= self.high:
            return "the interval includes zero: no difference seen"
        return "better" if (self.change < 0) == (self.better == "lower") else "worse"


@dataclass(frozen=True)
class Comparison:
    """Every difference, and how the intervals were made."""

    differences: list[Difference]
    num_blocks: int
    block_s: float
    is_paired: bool

    @property
    def has_intervals(self) -> bool:
        """Whether there are blocks enough to tell chance from a difference."""
        return self.num_blocks >= MIN_BLOCKS


Measure = Callable[[Figures, float], float | None]


def _percentile(field: str, rank: float) -> Measure:
    def measure(figures: Figures, seconds: float) -> float | None:
        values = getattr(figures, field)
        values = values[~np.isnan(values)]
        if not len(values):
            return None
        index = max(math.ceil(rank / 100 * len(values)), 1) - 1
        return float(np.partition(values, index)[index])

    return measure


# Name, unit, what is better, the figure.
MEASURES: tuple[tuple[str, str, Better, Measure], ...] = (
    ("latency, median", "s", "lower", _percentile("latency_s", 50)),
    ("latency, 99th percentile", "s", "lower", _percentile("latency_s", 99)),
    ("time to first token, median", "s", "lower", _percentile("first_token_s", 50)),
    ("time to first token, 99th percentile", "s", "lower", _percentile("first_token_s", 99)),
    ("inter-token latency, median", "s", "lower", _percentile("inter_token_s", 50)),
    ("inter-token latency, 99th percentile", "s", "lower", _percentile("inter_token_s", 99)),
    ("complete requests/s", "", "higher", lambda figures, seconds: float((1 - figures.failed).sum() / seconds)),
    ("output tokens/s", "", "higher", lambda figures, seconds: float(figures.tokens.sum() / seconds)),
    (
        "requests without a complete answer",
        "%",
        "lower",
        lambda figures, seconds: float(figures.failed.mean() * 100) if len(figures.failed) else None,
    ),
)


def compare(a: Result, b: Result, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Comparison:
    """Every figure of b less that of a. Requests are counted by when they were due."""
    is_paired = a.profile.load == b.profile.load and a.profile.arrivals == "open"
    num_blocks = _num_blocks(a, b)
    runs = [(figures_of(run.samples, run.profile.duration_s, num_blocks), run.profile.duration_s) for run in (a, b)]
    random = np.random.default_rng(seed)
    resampled: list[list[tuple[float | None, float | None]]] = [[] for _ in MEASURES]
    members = [[np.flatnonzero(figures.block == i) for i in range(num_blocks)] for figures, _ in runs]
    for _ in range(num_resamples):
        first = random.integers(num_blocks, size=num_blocks)
        second = first if is_paired else random.integers(num_blocks, size=num_blocks)
        drawn = [
            figures.take(np.concatenate([blocks[i] for i in chosen]))
            for (figures, _), blocks, chosen in zip(runs, members, (first, second), strict=True)
        ]
        for values, (_, _, _, measure) in zip(resampled, MEASURES, strict=True):
            values.append((measure(drawn[0], runs[0][1]), measure(drawn[1], runs[1][1])))
    differences = [
        Difference(name, unit, better, measure(*runs[0]), measure(*runs[1]), *_interval(values))
        for (name, unit, better, measure), values in zip(MEASURES, resampled, strict=True)
    ]
    comparison = Comparison(differences, num_blocks, a.profile.duration_s / num_blocks, is_paired)
    if not comparison.has_intervals:
        without = [dataclasses.replace(each, low=None, high=None) for each in differences]
        comparison = dataclasses.replace(comparison, differences=without)
    return comparison


def _num_blocks(a: Result, b: Result) -> int:
    """As many as leave each longer than nine in ten answers take: then one has little to do with the next."""
    seconds = min(a.profile.duration_s, b.profile.duration_s)
    num_blocks = max(MIN_BLOCKS, round(seconds / BLOCK_S))
    for run in (a, b):
        slow = percentile([sample.latency_s for sample in counted(run.samples) if sample.is_complete], 90)
        num_blocks = min(num_blocks, int(seconds / slow)) if slow else num_blocks
    return max(num_blocks, 1)


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


def _interval(values: Sequence[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    """The middle CONFIDENCE of b - a; nothing where a draw has no figure, or an infinite one."""
    changes = [b - a for a, b in values if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    if len(changes) < len(values) or not changes:
        return None, None
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(changes, [outside, 1 - outside])
    return float(low), float(high)


def run(first: Path, second: Path) -> int:
    """Print the table; 1 for a file that isn't a result."""
    try:
        a, b = load(first), load(second)
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(a, b, compare(a, b)))
    return 0


def table(a: Result, b: Result, comparison: Comparison) -> str:
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


def warnings(a: Result, b: Result) -> list[str]:
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
