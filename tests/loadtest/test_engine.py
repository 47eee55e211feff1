"""The engine's own metrics: histograms, their evaluation, and the agreement of client and engine."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.engine.metrics import descriptions
from deepseek_triton.ensemble.models.metrics import PREFIX
from deepseek_triton.loadtest import agreement, engine
from deepseek_triton.loadtest.engine import EngineWork
from deepseek_triton.loadtest.histogram import HistogramSnapshot
from deepseek_triton.loadtest.measure import percentile
from deepseek_triton.loadtest.metrics import ModelWork
from deepseek_triton.loadtest.result import load
from deepseek_triton.loadtest.validity import TOLERANCE
from tests.support.loadtests import engine_reading, failed, histogram, make_result, sample

READINGS = [engine_reading(0.0, []), engine_reading(1.0, [0.4] * 10), engine_reading(3.0, [0.4] * 10 + [0.8] * 10)]


@pytest.mark.slow
@given(st.lists(st.floats(0, 3), min_size=1, max_size=60), st.sampled_from([50, 90, 99]))
def test_a_percentile_lies_in_its_bucket_and_so_does_its_estimate(values: list[float], rank: int) -> None:
    found = histogram(values)
    bucket, exact, estimate = found.bucket(rank), percentile(values, rank), found.estimate(rank)
    assert bucket is not None and exact is not None and estimate is not None
    low, high = bucket
    assert exact == 0 or low < exact <= high
    assert low <= estimate <= high
    assert found.mean == pytest.approx(sum(values) / len(values))


def test_an_estimate_lies_where_even_observations_would_have_it() -> None:
    # Ten up to 0.1, ten more up to 0.5: the 15th of 20 is half way.
    assert HistogramSnapshot((0.1, 0.5, math.inf), (10, 20, 20), 0.0).estimate(75) == pytest.approx(0.3)
    assert HistogramSnapshot((0.1, 0.5, math.inf), (0, 0, 4), 0.0).estimate(50) == 0.5, (
        "all that is known of what is above"
    )
    assert HistogramSnapshot((0.1, math.inf), (0, 0), 0.0).estimate(50) is None


def test_what_came_since_an_earlier_reading() -> None:
    earlier, later = histogram([0.05, 2.0]), histogram([0.05, 2.0, 0.3])
    assert later.since(earlier).counts == (0, 1, 1, 1)
    assert later.since(earlier).total == pytest.approx(0.3)
    assert later.since(None) == later
    assert earlier.since(later) == earlier, "the server began anew: all it has is new"


@pytest.mark.parametrize("bounds", [(), (1.0,), (2.0, 1.0, math.inf)])
def test_what_is_no_histogram_is_refused(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="histogram"):
        HistogramSnapshot(bounds, tuple(0.0 for _ in bounds), 0.0)


def test_work_is_what_came_between_the_first_reading_and_the_last() -> None:
    done = engine.work(READINGS[1:], "smollm2")
    assert done is not None
    assert done.outcomes == {"accepted": 10, "cancelled": 0, "failed": 0, "refused": 0, "expired": 0}
    assert done.tokens == 50
    assert done.first_token_s.mean == pytest.approx(0.8)
    assert done.first_token_s.p50 == done.first_token_s.p99 == (0.5, 1.0)
    assert done.inter_token_s.count == 40
    # A tenth of a wait is the queue, the rest the prompt; four gaps of 0.2 s follow.
    assert [done.queue_s, done.prefill_s, done.decode_s] == pytest.approx([0.08, 0.72, 0.8])
    assert (done.slots, done.max_slots_used, done.max_waiting) == (8, 4, 2)


def test_the_course_of_an_engine() -> None:
    steps = engine.course(READINGS, "smollm2", [0.0, 1.0, 3.0, 4.0])
    assert steps is not None
    assert steps.tokens_per_s == [50, 25, None]
    assert steps.queue_s == pytest.approx([0.04, 0.08, None])
    assert steps.prefill_s == pytest.approx([0.36, 0.72, None])
    assert steps.decode_s == pytest.approx([0.8, 0.8, None])
    assert steps.first_token_p50_s == pytest.approx([0.3, 0.75, None])
    assert steps.slots_used == [4, 4, 4]


def test_a_model_that_says_nothing_of_itself() -> None:
    assert engine.work(READINGS, "other") is None
    assert engine.course(READINGS, "other", [0.0, 1.0]) is None
    assert engine.work([], "smollm2") is None


def test_an_engines_numbers_survive_the_file(tmp_path: Any) -> None:
    slow = [engine_reading(float(at), [40.0] * at) for at in range(3)]
    result = make_result([sample(0.5), sample(1.5)], readings=slow)
    assert result.engine is not None and result.engine.first_token_s.p99 == (1.0, math.inf)
    result.save(tmp_path / "result.json")
    again = load(tmp_path / "result.json")
    assert again.engine is not None and again.engine_course is not None
    assert again.engine.first_token_s == result.engine.first_token_s
    assert again.engine.outcomes == result.engine.outcomes
    assert result.engine_course is not None
    assert again.engine_course.slots_used == result.engine_course.slots_used
    assert 4.0 in again.engine_course.slots_used
    assert again.usage_course.server_mib == result.usage_course.server_mib == [400.0] * len(result.course.due_per_s)
    assert again.summary.backlog == result.summary.backlog


def work_of(waits: list[float], **changes: Any) -> EngineWork:
    done = engine.work([engine_reading(0.0, []), engine_reading(9.0, waits)], "smollm2")
    assert done is not None
    return dataclasses.replace(done, **changes)


# Five tokens each, the first 0.5 s after the request was sent, the others 0.2 s apart.
STREAMS = [sample(float(i), first_s=0.5, latency_s=1.3) for i in range(10)]
TOKENIZER = {"smollm2-tokenizer": ModelWork(10, 0, 10, 1.0, queue_ms=10.0, compute_ms=20.0, request_ms=30.0)}
LESS = "time to first token, the server's mean less the client's"
MORE = "time to first token, the client's mean less the server's"
INTER = "inter-token latency, client's mean against the server's"


def disagreements(engine: EngineWork, samples: Any = STREAMS, others: Any = TOKENIZER) -> list[str]:
    return [verdict.name for verdict in agreement.check(samples, engine, others) if not verdict.is_met]


@pytest.mark.parametrize(
    ("first_s", "missed"),
    [
        (0.49, []),
        # 0.03 s are the tokenizer's, and 0.05 s, a tenth of the client's half second, may be anybody's.
        (0.4201, []),
        (0.4199, [MORE]),
        (0.5001, [LESS]),
    ],
)
def test_a_clients_first_token_comes_after_the_engines_and_not_much_after(first_s: float, missed: list[str]) -> None:
    assert disagreements(work_of([first_s] * 10)) == missed


@pytest.mark.parametrize(("gap_s", "missed"), [(0.2, []), (0.181, []), (0.219, []), (0.179, [INTER]), (0.221, [INTER])])
def test_gaps_between_tokens_are_the_same_for_both(gap_s: float, missed: list[str]) -> None:
    done = engine.work([engine_reading(0.0, []), engine_reading(9.0, [0.49] * 10, gap_s=gap_s)], "smollm2")
    assert done is not None
    assert disagreements(done) == missed


@pytest.mark.parametrize("tokens", [49.0, 51.0])
def test_every_token_is_counted_by_both(tokens: float) -> None:
    assert disagreements(work_of([0.49] * 10, tokens=tokens)) == ["tokens, generated less received"]


def test_what_cannot_be_compared_is_not() -> None:
    whole = [dataclasses.replace(each, protocol="grpc") for each in STREAMS[:5]]
    (verdict,) = agreement.check([*whole, *STREAMS[5:]], work_of([0.1] * 10), TOKENIZER)
    assert verdict.name == "tokens, generated less received", "the engine's means are of others too"
    assert agreement.check([*STREAMS, failed(3.0)], work_of([0.49] * 11), TOKENIZER) == []
    assert agreement.check(STREAMS, None, TOKENIZER) == []
    assert 0 < TOLERANCE < 1


def test_a_run_whose_two_sides_disagree_is_invalid() -> None:
    readings = [engine_reading(-1.0, []), engine_reading(0.0, []), engine_reading(20.0, [0.49] * 10)]
    assert make_result(STREAMS, readings=readings).is_valid
    late = [dataclasses.replace(each, first_s=each.due_s + 0.8, end_s=each.due_s + 1.6) for each in STREAMS]
    assert [check.name for check in make_result(late, readings=readings).checks if not check.is_met] == [MORE]


def test_the_names_are_those_that_the_engine_publishes() -> None:
    published = {f"{PREFIX}{name}".removesuffix("_total") for name in descriptions()}
    read = {
        *(engine.FIRST_TOKEN, engine.INTER_TOKEN, engine.QUEUE, engine.TOKENS),
        *(engine.SLOTS, engine.SLOTS_USED, engine.WAITING, *engine.OUTCOMES.values()),
    }
    assert read <= published
