"""The comparison of two runs, and results as files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.loadtest.compare import Comparison, compare, figures_of, table
from deepseek_triton.loadtest.intervals import Difference
from deepseek_triton.loadtest.result import LoadTestResult, ResultError, load
from deepseek_triton.loadtest.sample import Sample
from tests.support.loadtests import failed, make_profile, make_result, sample


def samples(shift: float = 0.0, seed: int = 0, rate: int = 4) -> list[Sample]:
    """`rate` a second for 40 s; each due second has its own slowness, as a backlog would give it."""
    random = np.random.default_rng(seed)
    latencies = 1.0 + np.repeat(random.exponential(1.0, 40), rate) + shift
    return [sample(i / rate, latency_s=float(each), first_s=0.2 + shift) for i, each in enumerate(latencies)]


def difference(comparison: Comparison, name: str) -> Difference:
    (found,) = [each for each in comparison.differences if each.name == name]
    return found


def test_a_run_does_not_differ_from_itself() -> None:
    run = make_result(samples(rate=16))
    comparison = compare(run, run, num_resamples=200)
    assert comparison.is_paired
    assert (comparison.num_blocks, comparison.block_s) == (8, 5.0)
    for each in comparison.differences:
        assert (each.change, each.low, each.high) == (0, 0, 0)
        assert each.conclusion == "the interval includes zero: no difference seen"


@pytest.mark.slow
def test_an_even_shift_of_paired_runs_has_an_interval_without_width() -> None:
    # Whatever blocks are drawn, every latency of b is 0.1 s longer than its twin of a.
    comparison = compare(make_result(samples(rate=16)), make_result(samples(0.1, rate=16)), num_resamples=200)
    for name in ("latency, median", "latency, 99th percentile", "time to first token, median"):
        each = difference(comparison, name)
        assert [each.change, each.low, each.high] == pytest.approx([0.1, 0.1, 0.1]), name
        assert each.conclusion == "worse"
    faster = compare(make_result(samples(0.1)), make_result(samples()), num_resamples=200)
    assert difference(faster, "latency, median").conclusion == "better"


def test_different_profiles_are_not_paired_and_their_chance_counts_twice() -> None:
    other = make_profile(seed=8)
    comparison = compare(make_result(samples()), make_result(samples(seed=1), other), num_resamples=400)
    assert not comparison.is_paired
    each = difference(comparison, "latency, median")
    assert each.low is not None and each.high is not None and each.low < 0 < each.high
    assert each.conclusion == "the interval includes zero: no difference seen"
    assert "beware: the profiles differ, so the loads did" in table(
        make_result(samples()), make_result(samples(), other), comparison
    )


def test_blocks_see_that_neighbours_are_slow_together() -> None:
    # Forty-five seconds in blocks whose slowness is one draw each: the mean of 8 draws, not of 160.
    slow = [i // 20 % 2 for i in range(160)]
    a = make_result([sample(i / 4, latency_s=1.0 + slow[i]) for i in range(160)])
    b = make_result([sample(i / 4, latency_s=1.0 + slow[i]) for i in range(160)], make_profile(seed=9))
    each = difference(compare(a, b, num_resamples=400), "latency, median")
    # Each run's median is 1 or 2 by the toss of its blocks.
    assert (each.low, each.high) == (-1.0, 1.0)


def test_one_long_wait_is_one_event() -> None:
    # One burst: who comes while it is worked off waits, and two runs differ by chance in all of them together.
    def burst(faster_s: float) -> LoadTestResult:
        waits = [max(20.0 - i / 4, 1.0) - faster_s for i in range(160)]
        return make_result([sample(i / 4, latency_s=wait, first_s=0.1) for i, wait in enumerate(waits)])

    comparison = compare(burst(0.0), burst(0.5), num_resamples=50)
    assert (comparison.num_blocks, comparison.has_intervals) == (2, False)
    assert {(each.low, each.high) for each in comparison.differences} == {(None, None)}
    assert difference(comparison, "latency, median").change == pytest.approx(-0.5)
    assert "no intervals: answers take so long that 2 stretches of 20 s are all there is, and 8 are needed" in table(
        burst(0.0), burst(0.5), comparison
    )


def test_a_percentile_of_a_handful_of_requests_has_no_interval() -> None:
    comparison = compare(make_result(samples()), make_result(samples(0.1)), num_resamples=50)
    median, tail = (difference(comparison, f"latency, {name}") for name in ("median", "99th percentile"))
    assert median.conclusion == "worse"
    assert tail.change == pytest.approx(0.1)
    assert (tail.low, tail.conclusion) == (None, "no interval: too few requests, or some failed")


def test_failures_leave_their_percentile_without_a_figure_and_show_as_errors() -> None:
    broken = [failed(each.due_s) if i % 10 == 0 else each for i, each in enumerate(samples())]
    comparison = compare(make_result(samples()), make_result(broken), num_resamples=200)
    tail = difference(comparison, "latency, 99th percentile")
    assert tail.b == math.inf
    assert (tail.change, tail.low, tail.conclusion) == (None, None, "no interval: too few requests, or some failed")
    errors = difference(comparison, "requests without a complete answer")
    assert (errors.a, errors.b, errors.conclusion) == (0.0, 10.0, "worse")
    assert difference(comparison, "complete requests/s").change == pytest.approx(-0.4)


def test_the_same_seed_gives_the_same_interval() -> None:
    a, b = make_result(samples()), make_result(samples(seed=1), make_profile(seed=8))
    assert compare(a, b, num_resamples=50) == compare(a, b, num_resamples=50)
    assert compare(a, b, num_resamples=50) != compare(a, b, num_resamples=50, seed=1)


def test_the_warm_up_is_in_no_figure() -> None:
    figures = figures_of([sample(-1.0), sample(0.0), sample(39.9), failed(20.0, protocol="http")], 40.0, 8)
    assert figures.block.tolist() == [0, 7, 4]
    assert figures.failed.tolist() == [0, 0, 1]
    assert figures.latency_s.tolist()[2] == math.inf
    assert math.isnan(figures.first_token_s.tolist()[2]), "what isn't streamed has none to fail"


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    run = make_profile(levels={"p99_latency_s": 2.0})
    result = make_result([*samples(), failed(39.0), failed(39.5)], run)
    result.save(tmp_path / "result.json")
    again = load(tmp_path / "result.json")
    assert again.profile == result.profile and again.target == result.target
    assert again.summary.latency_s.p99 == result.summary.latency_s.p99 == math.inf
    assert again.missed[0].value == math.inf
    assert again.errors == {"RequestTimeout: too slow": 2}
    assert len(again.samples) == 162
    assert dataclasses.asdict(again.course)["edges"] == result.course.edges
    # Everything of a result is numbers that JSON has.
    json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a load test's result of format 2, got []"),
        ('{"format": 7}', "must be a load test's result of format 2, got 7"),
        ('{"format": 2}', "is not a whole result: 'profile'"),
    ],
)
def test_what_is_no_result_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ResultError):
        load(path)
    assert main(["compare", str(path), str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and message in error
    assert error.count("\n") == 1


def test_the_command_prints_each_figure_with_its_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    runs: list[LoadTestResult] = [make_result(samples()), make_result(samples(0.1), num_bugs=1)]
    for run, path in zip(runs, paths, strict=True):
        run.save(path)
    assert main(["compare", *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a: test, smollm2, 2026-11-24T05:00:00+00:00"
    assert "beware: run b is invalid" in lines
    assert any(
        line.startswith("95% intervals of b - a, from 8 blocks of time, drawn the same of both") for line in lines
    )
    (line,) = [line for line in lines if line.startswith("time to first token, median")]
    figures = "200 ms 300 ms +100 ms +50.0% +100 ms to +100 ms worse"
    assert " ".join(line.split()) == f"time to first token, median {figures}"
    assert main(["compare", str(paths[0]), str(tmp_path / "none.json")]) == 1
    assert "No such file" in capsys.readouterr().err
