"""Service levels and validity: the limits hold at their very value and are missed beyond it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.loadtest import levels, validity
from deepseek_triton.loadtest.measure import summarise
from deepseek_triton.loadtest.profile import Levels
from deepseek_triton.loadtest.status import MEANINGS, Status, help_text, status_of
from deepseek_triton.loadtest.verdict import Verdict, amount
from tests.support.loadtests import failed, make_profile, make_result, observed, reading, sample, usage

SAMPLES = [sample(float(i), latency_s=1.0 + i / 100, first_s=0.5) for i in range(20)]


def missed(verdicts: list[Verdict]) -> list[str]:
    return [verdict.name for verdict in verdicts if not verdict.is_met]


@pytest.mark.parametrize(
    ("level", "at", "below"),
    [
        ("p99_latency_s", 1.1901, 1.1899),
        ("p99_first_token_s", 0.5001, 0.4999),
        ("p99_inter_token_s", 0.1726, 0.1724),
        ("max_error_ratio", 0, None),
        ("max_backlog", 1, 0),
        ("max_backlog_s", 0.5001, 0.4999),
    ],
)
def test_each_level_holds_up_to_its_limit(level: str, at: Any, below: Any) -> None:
    summary = summarise(SAMPLES, 20.0)
    (verdict,) = levels.check(dataclasses.replace(Levels(), **{level: at}), summary)
    assert verdict.is_met, verdict
    if below is not None:
        (verdict,) = levels.check(dataclasses.replace(Levels(), **{level: below}), summary)
        assert not verdict.is_met, verdict


def test_failures_miss_the_error_level_and_the_latency() -> None:
    summary = summarise([*SAMPLES, failed(20.0)], 21.0)
    verdicts = levels.check(Levels(p99_latency_s=100, max_error_ratio=0.04), summary)
    assert [verdict.value for verdict in verdicts] == [math.inf, pytest.approx(100 / 21)]
    assert missed(verdicts) == ["latency, 99th percentile", "requests without a complete answer"]
    assert verdicts[0].sentence() == "latency, 99th percentile: failed, limit 100 s"
    assert verdicts[1].sentence() == "requests without a complete answer: 4.76 %, limit 4 %"


def test_a_level_without_a_figure_is_missed() -> None:
    summary = summarise([dataclasses.replace(each, protocol="http") for each in SAMPLES], 20.0)
    assert missed(levels.check(Levels(p99_first_token_s=100), summary)) == ["time to first token, 99th percentile"]


def test_no_levels_no_verdicts() -> None:
    assert levels.check(Levels(), summarise(SAMPLES, 20.0)) == []


def test_a_run_without_fault_is_valid() -> None:
    verdicts = validity.check(observed(SAMPLES, readings=(reading(0, 5), reading(1, 25))))
    assert missed(verdicts) == []
    assert len(verdicts) == 12


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"samples": [sample(-1.0)] * 20}, "requests counted are missing"),
        ({"usage": [usage(0.0), usage(5.0, generator_s=2.6)]}, "load generator's CPU, of one core, busiest 5 s"),
        ({"usage": [usage(0.0), usage(2.0, generator_s=1.1)]}, "load generator's CPU, of one core, busiest 5 s"),
        ({"usage": []}, "load generator's CPU, of one core, busiest 5 s"),
        ({"lags_s": [0.051] * 20}, "event loop's lag, median"),
        ({"lags_s": [0.0] * 97 + [0.051] * 3}, "event loop's lag, 99th percentile"),
        ({"usage": [usage(0.0), usage(10.0, others_s=2.1)]}, "CPU taken by other programs, of the whole machine"),
        ({"num_begun": 21}, "requests begun without a result"),
        ({"num_bugs": 1}, "exceptions in the generator"),
        ({"num_first_sent": 19}, "scheduled requests not sent, or sent twice"),
        ({"num_first_sent": 22}, "scheduled requests not sent, or sent twice"),
        (
            {"samples": [sample(float(i), sent_s=i + 0.051, first_s=0.5) for i in range(20)]},
            "requests sent late, 99th percentile",
        ),
        ({"readings": (reading(0, 5), reading(1, 2), reading(2, 22))}, "server or model restarts"),
        ({"readings": (reading(0, 5), reading(1, 26))}, "requests of others"),
        (
            {"readings": (reading(0, 5), reading(1, 25)), "num_missed_readings": 2},
            "readings of the server's counters missed",
        ),
    ],
)
def test_each_fault_makes_a_run_invalid(changes: dict[str, Any], name: str) -> None:
    assert name in missed(validity.check(observed(SAMPLES, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        # A tenth of the first response's half second, half a core, a tenth of two cores.
        {"lags_s": [0.0499] * 20},
        {"usage": [usage(0.0), usage(5.0, generator_s=2.5), usage(50.0, generator_s=2.5)]},
        {"usage": [usage(0.0), usage(10.0, others_s=1.99)]},
        {"usage": [usage(0.0), usage(10.0, others_s=19.0)], "may_be_shared": True},
        # A server that isn't here uses nothing of this machine; one that can't be seen can't be told from others.
        {"usage": [usage(0.0, server_s=None), usage(10.0, server_s=None)], "is_server_here": False},
        {"usage": [usage(0.0, server_s=None), usage(10.0, server_s=None, others_s=9.0)]},
        {"samples": [sample(float(i), sent_s=i + 0.0499, first_s=0.5) for i in range(20)]},
    ],
)
def test_what_is_within_a_limit_leaves_a_run_valid(changes: dict[str, Any]) -> None:
    assert missed(validity.check(observed(SAMPLES, **changes))) == []


def test_limits_of_time_follow_from_what_was_measured() -> None:
    slow = [sample(float(i), latency_s=20.0, first_s=10.0) for i in range(20)]
    assert missed(validity.check(observed(slow, lags_s=[0.9] * 20))) == []
    # Without streams there is no first token to be late for: the answer itself is.
    whole = [dataclasses.replace(each, protocol="http") for each in slow]
    assert missed(validity.check(observed(whole, lags_s=[1.9] * 20))) == []
    assert len(missed(validity.check(observed(whole, lags_s=[2.1] * 20)))) == 2


def test_closed_users_have_no_schedule_to_miss() -> None:
    names = [verdict.name for verdict in validity.check(observed(SAMPLES, num_scheduled=None))]
    assert "requests sent late, 99th percentile" not in names


def test_a_result_says_whether_it_holds() -> None:
    profile = make_profile(levels={"p99_latency_s": 1.0, "max_error_ratio": 0})
    result = make_result(SAMPLES, profile)
    assert result.is_valid
    assert [level.name for level in result.missed] == ["latency, 99th percentile"]
    assert status_of(result) is Status.MISSED and int(Status.MISSED) == 3
    invalid = make_result(SAMPLES, profile, num_bugs=1)
    assert not invalid.is_valid
    assert status_of(invalid) is Status.INVALID, "whether a level was missed can't be said"
    assert int(Status.INVALID) == 4
    assert status_of(make_result(SAMPLES)) is Status.OK and int(Status.OK) == 0


def test_every_status_has_its_meaning_and_its_place_in_the_document() -> None:
    assert list(MEANINGS) == list(Status)
    document = (Path(__file__).parents[2] / "docs" / "loadtest.md").read_text(encoding="utf-8")
    assert [
        (int(status), meaning) for status, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", document, re.MULTILINE)
    ] == [(status.value, meaning) for status, meaning in MEANINGS.items()]
    assert all(f"  {status.value:<4} {meaning}" in help_text().splitlines() for status, meaning in MEANINGS.items())


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "no figure"),
        (math.inf, "s", "failed"),
        (0.0123, "s", "12.3 ms"),
        (0.5, "s", "500 ms"),
        (1.0, "s", "1 s"),
        (1.234, "s", "1.23 s"),
        (-0.25, "s", "-250 ms"),
        (1234.5, "ms", "1,234 ms"),
        (0.0999999, "s", "100 ms"),
        (0.0, "%", "0 %"),
        (4.7619, "%", "4.76 %"),
        (12.0, "requests", "12 requests"),
        (7, "", "7"),
    ],
)
def test_amounts_are_written_as_people_write_them(value: float | None, unit: str, text: str) -> None:
    assert amount(value, unit) == text
