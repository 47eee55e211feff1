"""Service levels follow from measured runs: the rule, the command that applies it, and the project's own profiles."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.loadtest import profile
from deepseek_triton.loadtest.basis import main
from deepseek_triton.loadtest.profile import Basis, LoadProfileError
from deepseek_triton.loadtest.result import LoadTestResult
from tests.support.loadtests import failed, make_profile, make_result, sample

LEVELS = {"p99_latency_s": 9, "max_backlog": 9, "max_error_ratio": 0}


def run(latency_s: float, **changes: Any) -> LoadTestResult:
    samples = [sample(float(i), latency_s=latency_s, first_s=0.2) for i in range(30)]
    return make_result(samples, make_profile(levels=LEVELS), **changes)


@pytest.mark.parametrize(
    ("name", "values", "limit"),
    [
        ("p99_latency_s", (1.0, 3.0, 2.0), 4.0),
        ("p99_latency_s", (1.234,), 2.5),
        ("p99_latency_s", (61.2,), 130),
        ("p99_first_token_s", (0.0305,), 0.061),
        ("p99_first_token_s", (0.03051,), 0.062),
        ("max_backlog", (3, 4), 7),
        ("max_backlog", (61,), 130),
        ("max_backlog", (0, 0), 0),
        ("max_backlog", (1, 1), 2),
    ],
)
def test_a_level_is_twice_the_median_rounded_up_to_two_digits(
    name: str, values: tuple[float, ...], limit: float
) -> None:
    assert Basis(2.0, "a machine", {name: values}).limit(name) == limit


def test_the_tables_are_read_back_as_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, latency_s in zip(paths, (1.0, 1.5, 1.2), strict=True):
        run(latency_s).save(path)
    assert main([str(path) for path in paths]) == 0
    tables = capsys.readouterr().out
    path = tmp_path / "whole.toml"
    path.write_text((profile.DIRECTORY / "smoke.toml").read_text().split("[levels]")[0] + tables)
    read = profile.load(str(path))
    assert read.levels == profile.Levels(p99_latency_s=2.4, max_backlog=2, max_error_ratio=0)
    assert read.basis == Basis(2, "a processor, 2 cores", {"p99_latency_s": [1.0, 1.5, 1.2], "max_backlog": [1, 1, 1]})
    assert read.load == dataclasses.replace(profile.load("smoke").load, name="whole"), "promises send nothing"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run(1.0, num_bugs=1), "is invalid, and no basis for a service level"),
        (make_result([sample(0.0)], make_profile(seed=8, levels=LEVELS)), "are of different profiles"),
        (
            make_result([sample(0.0), *(failed(float(i)) for i in range(5))], make_profile(levels=LEVELS)),
            "must be a num",
        ),
    ],
)
def test_what_is_no_basis_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: LoadTestResult, message: str
) -> None:
    for name, result in (("a", run(1.0)), ("b", other)):
        result.save(tmp_path / f"{name}.json")
    assert main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert main([str(tmp_path / "none.json")]) == 1


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        ({"margin": 0.5}, "basis.margin must be a number from 1 to 100, got 0.5"),
        ({"runs": {"p99": [1]}}, "basis.runs must be one of p99_latency_s"),
        ({"runs": {"max_error_ratio": [0]}}, "basis.runs must be one of p99_latency_s"),
        ({"runs": {"max_backlog": []}}, "basis.runs.max_backlog must be an array with one number at least, got []"),
        ({"runs": {"max_backlog": ["1"]}}, "basis.runs.max_backlog must be a number"),
        ({"runs": []}, "basis.runs must be a table, got []"),
    ],
)
def test_a_basis_is_checked(basis: dict[str, Any], message: str) -> None:
    whole = {"margin": 2.0, "machine": "a machine", "runs": {"max_backlog": [1]}} | basis
    with pytest.raises(LoadProfileError) as error:
        make_profile(basis=whole)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", profile.names())
def test_every_level_of_the_projects_profiles_follows_from_its_basis(name: str) -> None:
    read = profile.load(name)
    promised = {level: limit for level, limit in vars(read.levels).items() if limit is not None}
    assert promised.pop("max_error_ratio") == 0
    if name in ("gateway", "scoring", "smoke"):
        assert promised == {} and read.basis is None, "it judges whether everything works, on any machine"
        return
    assert read.basis is not None
    assert promised == {level: read.basis.limit(level) for level in read.basis.runs}
