"""Whether confidence intervals have their nominal coverage."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from deepseek_triton.loadtest.intervals import (
    MEASURES,
    P99_LATENCY,
    REQUESTS_PER_S,
    Figures,
    Floats,
    Integers,
    Measure,
    ResampledRun,
    difference,
    interval,
    resample,
)


def run_of(latencies_s: list[Floats], seconds: float) -> ResampledRun:
    """A run without failures; an array for each block."""
    count = sum(map(len, latencies_s))
    none = np.full(count, math.nan)
    blocks = np.repeat(np.arange(len(latencies_s)), [len(each) for each in latencies_s])
    return ResampledRun(
        Figures(blocks, np.concatenate(latencies_s), none, none, np.zeros(count), np.zeros(count)), seconds
    )


def counts_run(counts: Floats) -> ResampledRun:
    """So many requests in each second, a second a block."""
    return run_of([np.ones(int(count)) for count in counts], float(len(counts)))


@pytest.mark.slow
def test_eight_paired_blocks_cover_the_difference_as_often_as_they_say() -> None:
    """Each block is a machine's mood that both runs share, and 10 requests of chance of each run's own."""
    random = np.random.default_rng(0)
    num_covered, num_trials = 0, 300
    for seed in range(num_trials):
        mood = random.normal(100, 20, 8)
        a, b = (counts_run(np.round(mood + random.normal(0, 5, 8) + more)) for more in (0, 15))
        (draws,) = resample([a, b], [REQUESTS_PER_S], 8, is_paired=True, num_resamples=400, seed=seed)
        found = difference(REQUESTS_PER_S, (a, b), draws, 8)
        assert found.low is not None and found.high is not None
        num_covered += found.low <= 15 <= found.high
    # In a long simulation 94 %, where quantiles of 2.5 % and 97.5 % cover 88 %; the spread of 300 trials is 1.4 %.
    assert 0.91 <= num_covered / num_trials <= 0.98


def test_pairing_takes_out_what_both_runs_met() -> None:
    mood = np.array([100, 180, 120, 160, 140, 110, 190, 130], np.float64)
    a, b = counts_run(mood), counts_run(mood + 5)
    widths = []
    for is_paired in (True, False):
        (draws,) = resample([a, b], [REQUESTS_PER_S], 8, is_paired=is_paired, num_resamples=300)
        found = difference(REQUESTS_PER_S, (a, b), draws, 8)
        assert found.low is not None and found.high is not None and found.change == 5
        widths.append(found.high - found.low)
        assert found.conclusion == ("better" if is_paired else "the interval includes zero: no difference seen")
    assert widths[0] == pytest.approx(0) and widths[1] > 20


def test_fewer_blocks_and_more_confidence_are_wider() -> None:
    values = [float(value) for value in np.random.default_rng(0).normal(size=20_000)]

    def width(num_blocks: int, confidence: float) -> float:
        low, high = interval(values, num_blocks, confidence)
        assert low is not None and high is not None
        return high - low

    assert width(5, 0.95) > width(8, 0.95) > width(30, 0.95) > 2 * 1.96
    assert width(8, 0.99) > width(8, 0.95)
    # Student's quantile for 7 degrees of freedom is 2.365, and the sample's spread is sqrt(7/8) of its estimate.
    assert width(8, 0.95) == pytest.approx(2 * 2.365 * math.sqrt(8 / 7), rel=0.03)


def test_a_draw_without_a_figure_leaves_no_interval() -> None:
    assert interval([1.0, None, 2.0], 8) == (None, None)
    assert interval([1.0, math.inf], 8) == (None, None)
    assert interval([], 8) == (None, None)
    run = run_of([np.array([0.1, 0.2])], 1.0)
    assert P99_LATENCY.of(run.figures, 1.0) == 0.2


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
@pytest.mark.parametrize("is_paired", [True, False])
def test_a_sample_has_the_measure_of_its_blocks_requests(measure: Measure, is_paired: bool) -> None:
    random = np.random.default_rng(0)

    def run(count: int) -> ResampledRun:
        def some() -> Floats:
            values: Floats = np.round(random.random(count), 1)  # with ties
            values[random.random(count) < 0.2] = math.nan
            values[random.random(count) < 0.1] = math.inf
            return values

        tokens, failed = random.integers(9, size=count).astype(float), (random.random(count) < 0.1).astype(float)
        return ResampledRun(Figures(random.integers(5, size=count), some(), some(), some(), tokens, failed), 3.7)

    def by_hand(run: ResampledRun, blocks: Integers) -> float:
        drawn = np.concatenate([np.flatnonzero(run.figures.block == i) for i in blocks])
        figures = Figures(*(getattr(run.figures, field.name)[drawn] for field in dataclasses.fields(Figures)))
        if not measure.unit:
            return float((figures.tokens if "token" in measure.name else 1 - figures.failed).sum() / run.seconds)
        if measure.unit == "%":
            return float(figures.failed.mean() * 100) if len(drawn) else math.nan
        field = {"late": "latency_s", "time": "first_token_s", "inte": "inter_token_s"}[measure.name[:4]]
        values = getattr(figures, field)
        values = np.sort(values[~np.isnan(values)])
        rank = 50 if "median" in measure.name else 99
        return float(values[max(math.ceil(rank / 100 * len(values)), 1) - 1]) if len(values) else math.nan

    for runs in ([run(200), run(150)], [run(1), run(3)], [run(0), run(40)]):
        (draws,) = resample(runs, [measure], 5, is_paired=is_paired, num_resamples=50, seed=1)
        random_blocks = np.random.default_rng(1)
        for sample in draws:
            first = random_blocks.integers(5, size=5)
            blocks = [first, first if is_paired else random_blocks.integers(5, size=5)]
            expected = [by_hand(each, chosen) for each, chosen in zip(runs, blocks, strict=True)]
            np.testing.assert_array_equal(sample, expected)
