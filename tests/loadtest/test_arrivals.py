"""Arrival times and prompts: exact values, and distributions within statistical limits."""

from __future__ import annotations

import math
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest

from deepseek_triton.clients.api import GenerateRequest, Generation, Message
from deepseek_triton.loadtest.arrivals import _at_integrals, all_stages, level_at, poisson
from deepseek_triton.loadtest.profile import Length, Stage
from deepseek_triton.loadtest.prompts import ConversationTurn, History, Talk, sample_length, talk
from tests.support.loadtests import PROFILE, make_profile


@pytest.mark.parametrize(
    ("stages", "integrals", "expected"),
    [
        # An even rate of 2/s: half a second for each.
        ([(0.0, Stage(10, 2, 2))], [1, 2, 19, 25], [0.5, 1.0, 9.5]),
        # From 0 to 4/s in 8 s the integral is t²/4.
        ([(0.0, Stage(8, 0, 4))], [0.25, 1, 4, 16, 99], [1.0, 2.0, 4.0]),
        # From 4 to 0/s in 8 s it is 4t - t²/4.
        ([(0.0, Stage(8, 4, 0))], [3.75, 7, 15, 99], [1.0, 2.0, 6.0]),
        # Stages follow each other, one without requests between them.
        ([(-5.0, Stage(5, 1, 1)), (0.0, Stage(10, 0, 0)), (10.0, Stage(2, 3, 3))], [2, 5, 8, 99], [-3.0, 10.0, 11.0]),
    ],
)
def test_arrivals_are_where_the_rates_integral_reaches_them(
    stages: list[tuple[float, Stage]], integrals: list[float], expected: list[float]
) -> None:
    assert list(_at_integrals(stages, iter(integrals))) == pytest.approx(expected)


def test_the_warm_up_comes_before_time_0_at_the_first_level() -> None:
    profile = make_profile(stages=[{"seconds": 10, "start": 2, "end": 4}, {"seconds": 10, "start": 8, "end": 8}])
    assert all_stages(profile) == [(-5, Stage(5, 2, 2)), (0, Stage(10, 2, 4)), (10, Stage(10, 8, 8))]
    assert [level_at(profile, t) for t in (-6, -5, 0, 5, 9.999, 10, 20)] == pytest.approx([0, 2, 2, 3, 3.9998, 8, 0])


def test_the_seed_decides_the_arrivals() -> None:
    first = poisson(make_profile())
    assert first == poisson(make_profile())
    assert first != poisson(make_profile(seed=8))
    # Of Python's own generator, whose numbers are the same on every machine.
    assert first[:3] == pytest.approx([-4.65147031, -3.40701888, -3.28210053], abs=1e-8)


@pytest.mark.slow
def test_arrivals_are_a_poisson_process() -> None:
    profile = make_profile(warmup_s=0, stages=[{"seconds": 20_000, "start": 2, "end": 2}])
    times = poisson(profile)
    assert times == sorted(times)
    assert abs(len(times) - 40_000) < 5 * math.sqrt(40_000)
    gaps = [b - a for a, b in pairwise(times)]
    # Exponential: mean and standard deviation are equal, and 1/e of the gaps are longer than the mean.
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.03)
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.01)


@pytest.mark.slow
def test_lengths_are_lognormal_within_their_limits() -> None:
    length = Length(median=20, sigma=0.7, least=4, most=200)
    values = sorted(sample_length(length, random.Random(i)) for i in range(20_000))
    assert statistics.median(values) == pytest.approx(20, rel=0.03)
    assert statistics.stdev(math.log(v) for v in values if 4 < v < 200) == pytest.approx(0.7, rel=0.05)
    assert values[0] == 4 and values[-1] == 200
    assert sample_length(Length(5, 0, 5, 5), random.Random(1)) == 5


CHAT: dict[str, Any] = {
    "form": "chat",
    "prompt_words": {"median": 10, "sigma": 0, "least": 10, "most": 10},
    "answer_tokens": {"median": 20, "sigma": 0, "least": 20, "most": 20},
    "conversation": {
        "turns": {"median": 3, "sigma": 0, "least": 3, "most": 3},
        "think_s": {"median": 2, "sigma": 0, "least": 2, "most": 2},
        "context_tokens": 200,
    },
}


@pytest.mark.slow
def test_a_talk_is_decided_by_seed_and_number() -> None:
    profile = make_profile(requests=CHAT, protocols={"grpc": 1, "http": 3})
    assert talk(profile, 4) == talk(profile, 4)
    assert talk(profile, 4) != talk(profile, 5)
    assert [turn.think_s for turn in talk(profile, 4).turns] == [0, 2, 2]
    assert {len(turn.text.split()) for turn in talk(profile, 4).turns} == {10}
    shares = [talk(profile, i).protocol for i in range(2000)]
    assert shares.count("http") / 2000 == pytest.approx(0.75, abs=0.05)


def test_each_turn_carries_all_before_it_until_the_context_is_full() -> None:
    profile = make_profile(requests=CHAT)
    turns = tuple(ConversationTurn(f"question {i}", 20, 0.0) for i in range(3))
    history = History(Talk(0, "grpc-stream", turns), profile.requests, profile.seed)
    first = history.request(turns[0])
    assert isinstance(first, GenerateRequest) and first.messages == (Message("user", "question 0"),)
    history.answered(Generation("answer 0", "stop", 30, 5))
    second = history.request(turns[1])
    assert isinstance(second, GenerateRequest) and second.messages == (
        Message("user", "question 0"),
        Message("assistant", "answer 0"),
        Message("user", "question 1"),
    )
    assert second.seed is None and second.temperature is None, "greedy"
    # 2 words, the template and 20 tokens more would pass 200.
    history.answered(Generation("answer 1", "stop", 150, 12))
    assert history.request(turns[2]) is None


def test_sampled_texts_get_a_seed_of_their_own() -> None:
    profile = make_profile(requests=PROFILE["requests"] | {"temperature": 0.7})
    requests = [History(talk(profile, i), profile.requests, 7).request(talk(profile, i).turns[0]) for i in (0, 1, 0)]
    seeds = [request.seed for request in requests if isinstance(request, GenerateRequest)]
    assert seeds == [7_000_021, 7_000_022, 7_000_021]
