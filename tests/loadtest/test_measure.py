"""Figures of samples that were made by hand: every number is worked out beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deepseek_triton.loadtest import measure
from deepseek_triton.loadtest.measure import (
    Backlog,
    backlog,
    course,
    course_edges,
    distribution,
    mean_depth,
    percentile,
    summarise,
)
from deepseek_triton.loadtest.sample import Sample, from_columns, to_columns
from tests.support.loadtests import failed, sample


@pytest.mark.parametrize(
    ("rank", "num_failed", "expected"),
    [(50, 0, 5.0), (90, 0, 9.0), (99, 0, 10.0), (100, 0, 10.0), (0, 0, 1.0), (50, 10, 10.0), (51, 10, math.inf)],
)
def test_percentiles_are_nearest_ranks(rank: float, num_failed: int, expected: float) -> None:
    assert percentile([10.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0], rank, num_failed) == expected


def test_a_percentile_of_nothing_is_none_and_of_failures_alone_infinite() -> None:
    assert percentile([], 99) is None
    assert percentile([], 99, num_failed=3) == math.inf


def test_one_failure_in_a_hundred_is_what_the_99th_percentile_allows() -> None:
    assert percentile([1.0] * 99, 99, num_failed=1) == 1.0
    assert percentile([1.0] * 98, 99, num_failed=2) == math.inf


def test_a_samples_figures_count_from_when_it_was_due() -> None:
    late = sample(10.0, latency_s=3.0, first_s=1.0, sent_s=10.5)
    assert late.late_s == 0.5
    assert late.latency_s == 3.0
    assert late.first_token_s == 1.0
    # Two seconds for the four tokens after the first response, in however many responses they came.
    assert late.inter_token_s == 0.5
    assert sample(num_first_tokens=3, num_responses=2, latency_s=1.0, first_s=0.2).inter_token_s == pytest.approx(0.4)
    assert sample(num_first_tokens=5).inter_token_s is None, "nothing came after the first response"
    assert sample(protocol="http").inter_token_s is None
    assert sample(protocol="http").first_token_s is None, "an answer in one piece has no first token to see"


@pytest.mark.parametrize(
    ("changes", "complete"),
    [
        ({}, True),
        ({"finish_reason": "stop"}, True),
        ({"finish_reason": ""}, False),
        ({"finish_reason": "cancelled"}, False),
        ({"finish_reason": "error"}, False),
        ({"error": "ClientError: no"}, False),
    ],
)
def test_an_answer_is_complete_with_a_proper_end(changes: dict[str, Any], complete: bool) -> None:
    assert sample(**changes).is_complete is complete


def test_the_summary_of_a_run() -> None:
    samples = [
        sample(0.0, latency_s=1.0, first_s=0.2),
        sample(1.0, latency_s=2.0, first_s=0.4),
        sample(2.0, latency_s=3.0, first_s=0.6, protocol="http"),
        failed(3.0, latency_s=4.0),
        sample(4.0, latency_s=6.0, finish_reason="cancelled"),
    ]
    summary = summarise(samples, 8.0)
    assert (summary.num_requests, summary.num_complete, summary.num_errors, summary.num_incomplete) == (5, 3, 1, 1)
    assert summary.error_ratio == 0.4
    assert summary.latency_s.mean == 2.0
    assert (summary.latency_s.p50, summary.latency_s.p90) == (3.0, math.inf), "two of five failed"
    assert summary.first_token_s.count == 2, "the HTTP answer came in one piece"
    assert summary.first_token_s.p50 == pytest.approx(0.4)
    assert summary.inter_token_s.mean == pytest.approx((0.8 / 4 + 1.6 / 4) / 2)
    assert summary.stream_tokens_per_s.max == pytest.approx(5.0)
    assert summary.requests_per_s == 3 / 8
    assert summary.output_tokens_per_s == 15 / 8


def test_rates_count_the_time_that_late_answers_took() -> None:
    summary = summarise([sample(9.0, latency_s=11.0)], 10.0)
    assert summary.requests_per_s == 1 / 20


def test_the_warm_up_is_what_was_due_before_0() -> None:
    samples = [sample(-0.1, latency_s=5.0), sample(0.0), sample(3.0)]
    assert measure.counted(samples) == samples[1:]


def test_the_backlog_is_what_is_due_and_has_not_begun() -> None:
    samples = [
        sample(0.0, first_s=3.0, latency_s=9.0),
        sample(1.0, first_s=3.0, latency_s=9.0),
        failed(2.0, latency_s=0.5),
        sample(3.0, first_s=0.5, latency_s=1.0),  # begins as the first one stops waiting
    ]
    assert summarise(samples, 10.0).backlog == Backlog(peak=3, began_s=0.0, peak_s=2.0, gone_s=4.0)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], Backlog(0, 0.0, 0.0, 0.0)),
        ([(1, 1)], Backlog(0, 0.0, 0.0, 0.0)),
        # One that ends as another begins doesn't overlap with it.
        ([(0, 1), (1, 2)], Backlog(1, 0, 0, 1)),
        # The stretch around the peak, not the longest one; its first moment at the peak's height.
        ([(0, 9), (20, 26), (21, 24), (22, 23), (23.5, 25)], Backlog(3, 20, 22, 26)),
        # A second stretch as deep as the first changes nothing.
        ([(0, 2), (1, 3), (5, 7), (6, 8)], Backlog(2, 0, 1, 3)),
    ],
)
def test_a_backlogs_peak_begin_and_end(intervals: list[tuple[float, float]], expected: Backlog) -> None:
    assert backlog(intervals) == expected
    assert expected.lasted_s == expected.gone_s - expected.began_s


def test_depth_is_averaged_over_each_step() -> None:
    assert mean_depth([(0.5, 2.0), (1.0, 1.5)], [0, 1, 2, 4]) == [0.5, 1.5, 0.0]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (-3, 5, [-3, -2, -1, 0, 1, 2, 3, 4, 5]),
        (-10, 100, [float(edge) for edge in range(-10, 101, 5)]),
        (0, 0.5, [0, 1]),
    ],
)
def test_the_course_has_a_border_at_0(start: float, end: float, expected: list[float]) -> None:
    assert course_edges(start, end) == expected


def test_the_course_of_a_run() -> None:
    samples = [
        sample(0.2, latency_s=0.5, first_s=0.1),
        sample(0.4, latency_s=2.0, first_s=1.0),
        failed(1.5, latency_s=0.4),
    ]
    steps = course(samples, {0: 4, 1: 2, 2: 10}, [0.0, 1.0, 2.0, 3.0])
    assert steps.due_per_s == [2, 1, 0]
    assert steps.complete_per_s == [1, 0, 1]
    assert steps.failed_per_s == [0, 1, 0]
    assert steps.tokens_per_s == [4, 2, 10]
    # By when they were due; the failed one has no latency.
    assert steps.latency_p50_s == [pytest.approx(0.5), None, None]
    assert steps.latency_p99_s == [pytest.approx(2.0), None, None]
    assert steps.inter_token_p50_s == [pytest.approx(0.1), None, None]
    assert steps.inter_token_p99_s == [pytest.approx(0.25), None, None]
    assert steps.waiting == pytest.approx([0.1 + 0.6, 0.4 + 0.4, 0])
    assert steps.answering == pytest.approx([0.4, 0.6, 0.4])


def test_an_empty_distribution() -> None:
    assert distribution([None, None]) == measure.Distribution(0, None, None, None, None, None)


def test_samples_survive_as_columns() -> None:
    samples = [sample(1.23456789, latency_s=2.0), failed(2.0)]
    columns = to_columns(samples)
    assert columns["due_s"] == [1.2346, 2.0]
    again = from_columns(columns)
    assert again[1] == samples[1]
    assert isinstance(again[0], Sample) and again[0].latency_s == pytest.approx(2.0, abs=1e-4)
    with pytest.raises(ValueError, match="samples must have the columns protocol, due_s"):
        from_columns({"due_s": [1.0]})
    with pytest.raises(ValueError, match="one length"):
        from_columns(columns | {"error": [""]})
