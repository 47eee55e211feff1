"""Which levels a run is judged by: a recorded run's, the profile's own, or none of speed."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_triton.loadtest.against import judged_against, machine_name, without_foreign_levels
from deepseek_triton.loadtest.profile import Levels, LoadProfileError
from deepseek_triton.loadtest.result import LoadTestResult
from deepseek_triton.loadtest.status import Status, status_of
from tests.support.loadtests import failed, make_profile, make_result, sample


def run(latency_s: float = 1.0, first_s: float | None = 0.2, **changes: Any) -> LoadTestResult:
    samples = [sample(float(i), latency_s=latency_s, first_s=first_s) for i in range(30)]
    return make_result(samples, make_profile(levels={"max_error_ratio": 0}), **changes)


def test_levels_are_twice_the_recorded_figures() -> None:
    recorded = run(1.0, 0.2)
    chosen = judged_against(recorded.profile, recorded, recorded.target.model, recorded.machine)
    assert (chosen.levels.p99_latency_s, chosen.levels.p99_first_token_s) == (2.0, 0.4)
    assert chosen.levels.p99_inter_token_s is not None and chosen.levels.max_error_ratio == 0
    assert chosen.levels.max_backlog is None, "the profile doesn't promise it"
    assert chosen.load == recorded.profile.load


@pytest.mark.parametrize(
    ("latency_s", "missed"),
    [(1.9, []), (2.1, ["latency, 99th percentile", "inter-token latency, 99th percentile"])],
)
def test_a_run_that_is_half_as_fast_misses_them(latency_s: float, missed: list[str]) -> None:
    recorded = run(1.0)
    chosen = judged_against(recorded.profile, recorded, recorded.target.model, recorded.machine)
    later = make_result([sample(float(i), latency_s=latency_s, first_s=0.39) for i in range(30)], chosen)
    assert [level.name for level in later.missed] == missed
    assert status_of(later) == (Status.MISSED if missed else Status.OK)


def test_what_a_run_cannot_be_judged_against() -> None:
    recorded = run()

    def error(recorded: LoadTestResult, model: str = recorded.target.model, **machine: Any) -> str:
        with pytest.raises(LoadProfileError) as caught:
            judged_against(run().profile, recorded, model, recorded.machine | machine)
        return str(caught.value)

    assert "is invalid: speed can't be judged" in error(run(num_bugs=1))
    other = make_profile(seed=8, levels={"max_error_ratio": 0})
    assert "another profile or scale" in error(make_result([sample(float(i)) for i in range(30)], other))
    assert "was of model 'smollm2', this is 'r1'" in error(recorded, "r1")
    assert "was on another machine: cores was 2, here it is 64" in error(recorded, cores=64)
    broken = [sample(0.0), *(failed(float(i)) for i in range(1, 6))]
    assert "must be a number" in error(make_result(broken, recorded.profile))


def test_levels_of_another_machine_do_not_count() -> None:
    machine = run().machine
    levels = {"p99_latency_s": 2.0, "max_error_ratio": 0}
    basis = {"margin": 2.0, "machine": machine_name(machine), "runs": {"p99_latency_s": [1.0]}}
    here = make_profile(levels=levels, basis=basis)
    assert without_foreign_levels(here, machine) == here
    there = make_profile(levels=levels, basis=basis | {"machine": "another, 96 cores"})
    assert without_foreign_levels(there, machine).levels == Levels(max_error_ratio=0)
    promised = make_profile(levels=levels)
    assert without_foreign_levels(promised, machine) == promised, "without a basis they are promised for any machine"
