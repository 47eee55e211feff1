"""A candidate wins only if repeated measurements show it, beyond the noise and within the limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.builders.tune.confirm import Decision, contenders, decide, order
from deepseek_triton.builders.tune.measurement import Measured, Measurement
from deepseek_triton.builders.tune.options import NUM_CANDIDATES, ROUNDS, TuneError
from deepseek_triton.builders.tune.report import decision_table, plot, search_table
from tests.support.tuning import SECONDS, found

LIMIT_MS = 100.0
START = {"batch": 1}


def points(count: int) -> list[dict[str, int]]:
    return [{"batch": i + 1} for i in range(count)]


def rounds(
    *throughputs: float, p99_ms: tuple[float, ...] = (), noise: float = 0.02, drift: float = 0.0, seed: int = 0
) -> list[list[Measurement]]:
    """Each point's requests/s with noise of its own, and the machine's drift that all of a round meet."""
    random = np.random.default_rng(seed)
    tails = p99_ms or (50.0,) * len(throughputs)
    return [
        [
            found(rate * (1 + drift * number) * (1 + random.normal(0, noise)), tail * (1 + random.normal(0, noise)))
            for rate, tail in zip(throughputs, tails, strict=True)
        ]
        for number in range(ROUNDS)
    ]


def verdicts(*throughputs: float, p99_ms: tuple[float, ...] = (), **changes: float) -> tuple[list[str], int | None]:
    decision = decide(
        points(len(throughputs)), rounds(*throughputs, p99_ms=p99_ms, **changes), LIMIT_MS  # type: ignore[arg-type]
    )  # fmt: skip
    return decision.verdicts, decision.winner.point["batch"] if decision.winner else None


def test_a_clear_gain_wins_and_the_larger_of_two_wins_first() -> None:
    assert verdicts(20, 24, 22) == (["the start", "better", "better"], 2)
    assert verdicts(20, 16, 22) == (["the start", "worse", "better"], 3)


def test_what_is_within_the_noise_does_not_win() -> None:
    assert verdicts(20, 20, 19.9) == (["the start", "no difference seen", "no difference seen"], None)
    assert verdicts(20, 20.6, noise=0.1) == (["the start", "no difference seen"], None)


@pytest.mark.slow
def test_two_equal_configurations_are_seldom_told_apart() -> None:
    won = sum(verdicts(20, 20, 20, seed=seed)[1] is not None for seed in range(24))
    assert won <= 2, "nominal: 1 in 40, for both candidates together"


def test_pairing_sees_through_a_drift_that_is_larger_than_the_gain() -> None:
    assert verdicts(20, 21, drift=0.1, noise=0.01) == (["the start", "better"], 2)


def test_over_the_limit_nothing_wins_however_fast() -> None:
    assert verdicts(20, 90, p99_ms=(50, 120)) == (["the start", "over the limit"], None)
    told, winner = verdicts(20, 90, p99_ms=(50, 99), noise=0.05)
    assert told[1] in ("not surely within the limit", "over the limit") and winner is None


def test_of_a_start_that_misses_the_limit_less_delay_wins_too() -> None:
    assert verdicts(40, 20, p99_ms=(150, 60)) == (["the start, over the limit", "better"], 2)
    assert verdicts(40, 20, p99_ms=(150, 140)) == (["the start, over the limit", "over the limit"], None)
    assert verdicts(40, 20, p99_ms=(90, 60)) == (["the start", "worse"], None), "the start holds the limit"


def test_one_lucky_measurement_decides_nothing() -> None:
    lucky = rounds(20, 20)
    lucky[3][1] = found(60, 50)
    assert decide(points(2), lucky, LIMIT_MS).winner is None
    late = rounds(20, 30)
    late[3][1] = Measurement((50.0,) * 290 + (400.0,) * 10, SECONDS)  # 10 of some 2,400 requests
    decision = decide(points(2), late, LIMIT_MS)
    assert decision.verdicts[1] == "not surely within the limit" and decision.winner is None


def test_a_candidate_that_fails_once_is_out_and_a_start_that_fails_is_an_error() -> None:
    measured = rounds(20, 30, 25)
    measured[2][1] = found(0, failure="no memory")
    decision = decide(points(3), measured, LIMIT_MS)
    assert decision.verdicts == ["the start", "no memory", "better"]
    assert decision.winner is not None and decision.winner.point == {"batch": 3}
    measured[2][0] = found(0, failure="gone")
    with pytest.raises(ValueError, match="the start has failed: gone"):
        decide(points(3), measured, LIMIT_MS)


def test_figures_are_of_all_rounds_together() -> None:
    measured = [[found(10 + i, 50 + i), found(20 + i, 70 + i)] for i in range(8)]
    start, candidate = decide(points(2), measured, LIMIT_MS).confirmed
    assert start.requests_per_s is not None and start.p99_s is not None and candidate.gain is not None
    assert start.requests_per_s.value == pytest.approx(13.5)
    assert start.requests_per_s.low < 13.5 < start.requests_per_s.high
    everything = sorted(latency for row in measured for latency in row[0].latencies_ms)
    assert start.p99_s.value * 1e3 == pytest.approx(everything[-(-99 * len(everything) // 100) - 1])
    assert candidate.gain.change == pytest.approx(10)
    assert (candidate.gain.low, candidate.gain.high) == pytest.approx((10, 10)), "pairs differ by 10, every one"


def test_candidates_are_the_fastest_within_the_limit_then_those_near_it() -> None:
    def one(batch: int, throughput: float, p99_ms: float = 50.0) -> Measured:
        return Measured({"batch": batch}, found(throughput, p99_ms))

    measured = [one(1, 99), one(2, 10), one(3, 30), one(4, 20), one(5, 90, 110), one(6, 90, 300)]
    assert contenders(measured, START, LIMIT_MS) == [{"batch": 1}, {"batch": 3}, {"batch": 4}]
    assert len(contenders(measured, START, LIMIT_MS)) == 1 + NUM_CANDIDATES
    assert contenders([one(1, 9), one(2, 8, 110), one(3, 5, 105), one(6, 7, 300)], START, LIMIT_MS) == [
        {"batch": 1}, {"batch": 3}, {"batch": 2},
    ]  # fmt: skip
    failed = Measured({"batch": 7}, found(0, failure="x"))
    assert contenders([one(1, 9), one(6, 90, 300), failed], START, LIMIT_MS) == [START], "nothing worth the time"


def test_rounds_go_there_and_back() -> None:
    assert [order(3, number) for number in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


# What a user reads


@pytest.fixture
def decision() -> Decision:
    measured = rounds(20, 24, 26, p99_ms=(50, 60, 120))
    return decide(points(3), measured, LIMIT_MS)


def test_the_tables_show_intervals_marks_and_reasons(decision: Decision) -> None:
    lines = decision_table(decision, ROUNDS).splitlines()
    assert lines[0].startswith("8 rounds together, 95% intervals")
    assert [line[0] for line in lines[2:]] == [">", "*", " "]
    assert lines[2].endswith("the start") and lines[3].endswith("better") and lines[4].endswith("over the limit")
    winner = decision.confirmed[1]
    assert winner.requests_per_s is not None and winner.gain is not None and winner.gain.low is not None
    rate = winner.requests_per_s
    assert f"{rate.value:.2f} [{rate.low:.2f} to {rate.high:.2f}]" in lines[3]
    assert "+20" in lines[3] or "+19" in lines[3] or "+21" in lines[3]

    measured = [
        Measured({"batch": 1}, found(20, 50)),
        Measured({"batch": 2}, found(24, 150)),
        Measured({"batch": 4}, found(0, failure="no memory")),
    ]
    lines = search_table(measured, START, LIMIT_MS).splitlines()
    assert [line[:2] for line in lines] == ["  ", " -", "> ", " -"], "the fastest first"
    assert lines[3].endswith("no memory") and "24.00" in lines[1]


@pytest.mark.slow
def test_the_plot_has_intervals_and_says_where_it_cannot_be(decision: Decision, tmp_path: Path) -> None:
    import matplotlib.figure

    seen: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *arguments: object, **options: object) -> None:
        seen.append(figure)
        save(figure, *arguments, **options)  # type: ignore[arg-type]

    measured = [Measured(point, found(20 + i, 50)) for i, point in enumerate(points(4))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(matplotlib.figure.Figure, "savefig", keep)
        plot(measured, START, decision, LIMIT_MS, "m, 16 clients", tmp_path / "a.png")
        plot(measured, START, None, LIMIT_MS, "m, 16 clients", tmp_path / "b.png")
    with_intervals, without = (figure.axes[0] for figure in seen)
    assert len(with_intervals.containers) == 3, "an error bar for each configuration of the rounds"
    _, _, bars = with_intervals.containers[1]
    (bottom, top) = bars[1].get_segments()[0][:, 1]
    rate = decision.confirmed[1].requests_per_s
    assert rate is not None and (bottom, top) == pytest.approx((rate.low, rate.high))
    labels = [text.get_text() for text in seen[0].legends[0].get_texts()]
    assert any(label.startswith("candidate 1, the winner") for label in labels) and "limit 100 ms" in labels
    assert not without.containers
    with pytest.raises(TuneError, match=r"no/a.png: No such file"):
        plot(measured, START, None, LIMIT_MS, "m", tmp_path / "no" / "a.png")


def test_seconds_of_the_helper() -> None:
    assert found(12.5, 40).throughput == 12.5 and found(12.5, 40).p99_ms == 40 and found(1).seconds == SECONDS
