"""The gate of a release: what passes, what fails, what can't be said, and what is recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deepseek_triton.loadtest.levels import check
from deepseek_triton.loadtest.result import LoadTestResult
from deepseek_triton.loadtest.status import Status, status_of
from scripts.release_check import Finding, judge, twice_if_chance
from tests.support.loadtests import failed, make_profile, make_result, sample


def result(latency_s: float, number: int = 160) -> LoadTestResult:
    made = make_result([sample(40 * i / number, latency_s=latency_s + 0.01 * (i % 7)) for i in range(number)])
    return dataclasses.replace(made, checks=[])


def saved(made: LoadTestResult, path: Path) -> Path:
    made.save(path)
    return path


def test_the_first_run_is_recorded_and_a_like_one_passes(tmp_path: Path) -> None:
    record = tmp_path / "records" / "smoke.json"
    first = judge("smoke", 0, saved(result(1.0), tmp_path / "a.json"), record, replace=False)
    assert first.status == Status.OK and "speed wasn't judged" in first.lines[0]
    content = record.read_bytes()
    alike = judge("smoke", 0, saved(result(1.02), tmp_path / "b.json"), record, replace=False)
    assert alike.status == Status.OK and "compared with the run of 2026-11-24" in alike.lines[0]
    assert record.read_bytes() == content, "a run that passes replaces nothing unless it is asked to"
    judge("smoke", 0, tmp_path / "b.json", record, replace=True)
    assert record.read_bytes() != content


def test_a_slower_run_fails_and_says_what_is_worse(tmp_path: Path) -> None:
    record = saved(result(1.0), tmp_path / "record.json")
    found = judge("steady", 0, saved(result(1.5), tmp_path / "now.json"), record, replace=True)
    assert found.status == Status.ERROR
    assert any("latency" in line and "worse" in line for line in found.lines[1:])
    faster = judge("steady", 0, saved(result(0.8), tmp_path / "fast.json"), record, replace=False)
    assert faster.status == Status.OK


def test_what_cannot_be_judged_is_told(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    gone = judge("smoke", 1, tmp_path / "no.json", record, replace=False)
    assert gone.status == Status.ERROR and "ended with status 1" in gone.lines[0]
    invalid = make_result([], num_begun=3)
    assert status_of(invalid) == Status.INVALID
    assert judge("smoke", 4, saved(invalid, tmp_path / "i.json"), record, replace=False).status == Status.INVALID
    assert not record.exists(), "an invalid run is no record"
    other = dataclasses.replace(result(1.0), profile=make_profile(seed=9))
    saved(other, record)
    found = judge("smoke", 0, saved(result(1.0), tmp_path / "n.json"), record, replace=False)
    assert found.status == Status.ERROR and "another profile or scale" in found.lines[0] and "remove" in found.lines[0]


def test_speed_is_judged_by_the_record_of_the_machine_alone(tmp_path: Path) -> None:
    """Levels that were measured on a faster machine say nothing; twice the record's percentiles do."""
    record, slow = tmp_path / "records" / "steady.json", result(3.0)
    strict = make_profile(levels={"p99_latency_s": 1.0, "max_error_ratio": 0})
    first = dataclasses.replace(slow, profile=strict, levels=check(strict.levels, slow.summary))
    assert status_of(first) == Status.MISSED
    found = judge("steady", 3, saved(first, tmp_path / "a.json"), record, replace=False)
    assert found.status == Status.OK and record.is_file()
    assert judge("steady", 3, tmp_path / "a.json", record, replace=False).status == Status.OK
    tail = make_result([sample(i / 4, latency_s=3.0 + 4 * (i % 80 == 9)) for i in range(160)])
    found = judge("steady", 3, saved(dataclasses.replace(tail, checks=[]), tmp_path / "b.json"), record, replace=False)
    assert found.status == Status.ERROR and found.may_be_chance
    assert "latency, 99th percentile: 7 s, limit 6.20 s" in found.lines


def test_an_error_is_no_chance(tmp_path: Path) -> None:
    record = saved(result(1.0), tmp_path / "record.json")
    profile = make_profile(levels={"max_error_ratio": 0})
    broken = make_result([*(sample(i / 4) for i in range(159)), failed(39.9)], profile)
    found = judge(
        "smoke", 3, saved(dataclasses.replace(broken, checks=[]), tmp_path / "now.json"), record, replace=True
    )
    assert found.status == Status.ERROR and not found.may_be_chance
    assert "requests without a complete answer" in found.lines[0]


@pytest.mark.parametrize(
    ("statuses", "ends"),
    [
        ([Status.OK], Status.OK),
        ([Status.INVALID, Status.OK], Status.OK),
        ([Status.ERROR, Status.OK], Status.OK),
        ([Status.INVALID, Status.INVALID], Status.INVALID),
        ([Status.INVALID, Status.ERROR], Status.ERROR),
    ],
)
def test_what_may_be_chance_counts_if_a_second_run_has_it_too(statuses: list[Status], ends: Status) -> None:
    runs = [
        Finding("steady", status, (f"run {number}",), may_be_chance=status != Status.OK)
        for number, status in enumerate(statuses)
    ]
    left = iter(runs)
    found = twice_if_chance(lambda: next(left))
    assert found.status == ends and found.lines[-1] == runs[-1].lines[0]
    assert next(left, None) is None
    assert len(statuses) == 1 or found.lines[0] == "the second run; of the first: run 0"


def test_a_fault_is_not_run_again() -> None:
    left = iter([Finding("smoke", Status.ERROR, ("an error",)), Finding("smoke", Status.OK, ("fine",))])
    assert twice_if_chance(lambda: next(left)).lines == ("an error",)
