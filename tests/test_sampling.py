from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ensemble.sampling import Sampler, SamplingError, SamplingParams
from ensemble.sampling.candidates import NUCLEUS_CANDIDATES

Logits = NDArray[np.float32]
LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.15, 0.05], np.float32)) + np.float32(3)
DRAWS = 4000


def probabilities(logits: Iterable[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """The distribution by its definition, token by token."""
    logits = list(logits)
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if top_k:
        order = order[:top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if mass >= top_p * total * (1 - 1e-6):
            break
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


def draw(logits: Logits, count: int = DRAWS, **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**{"seed": 7, "temperature": 1.0, **params}))
    return [sampler.sample(logits).token for _ in range(count)]


def chi_square(tokens: list[int], expected: list[float]) -> float:
    """Pearson's statistic; a token that can't come makes it infinite."""
    counts = np.bincount(tokens, minlength=len(expected))
    possible = np.array(expected) > 0
    if counts[~possible].any():
        return math.inf
    wanted = np.array(expected)[possible] * len(tokens)
    return float(((counts[possible] - wanted) ** 2 / wanted).sum())


# 5 degrees of freedom: a right sampler exceeds this once in 10,000 seeds
LIMIT = 25.7


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 3, "temperature": 1.7},
        {"top_p": 0.7},
        {"top_p": 0.81, "temperature": 1.3},
        {"top_k": 4, "top_p": 0.8},
        {"top_k": 100},
        {"top_p": 0.999},
    ],
)
def test_tokens_come_as_often_as_their_probability_says(params: dict[str, Any]) -> None:
    expected = probabilities(LOGITS.tolist(), **params)
    tokens = draw(LOGITS, **params)
    assert chi_square(tokens, expected) < LIMIT
    # The test can tell: neither the plain distribution nor another temperature fits.
    for other in ({}, {"temperature": 3.0}, {"top_k": 2}):
        if probabilities(LOGITS.tolist(), **other) != pytest.approx(expected, abs=0.01):
            assert chi_square(tokens, probabilities(LOGITS.tolist(), **other)) > LIMIT


def test_top_p_is_of_what_top_k_left() -> None:
    # The three likeliest hold 0.4, 0.25 and 0.15: of their 0.8 the first two are 0.81.
    assert set(draw(LOGITS, top_k=3, top_p=0.81)) == {1, 3}
    assert set(draw(LOGITS, top_k=3, top_p=0.82)) == {1, 3, 4}
    assert set(draw(LOGITS, top_p=0.81)) == {1, 3, 4, 2}


def test_the_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    even = np.zeros(4, np.float32)  # exactly a quarter each
    assert set(draw(even, top_p=0.25)) == {0}
    assert set(draw(even, top_p=0.5)) == {0, 1}
    assert set(draw(even, top_p=0.51)) == {0, 1, 2}
    assert set(draw(even, top_p=1e-9)) == {0}
    assert set(draw(even, top_p=math.nextafter(1, 0))) == {0, 1, 2, 3}


def test_of_equal_tokens_the_lower_ids_are_kept() -> None:
    even = np.zeros(5000, np.float32)
    even[[10, 3000]] = 1.0
    assert set(draw(even, top_k=1)) == {10}
    assert set(draw(even, top_k=2)) == {10, 3000}
    assert set(draw(even, top_k=5)) == {0, 1, 2, 10, 3000}
    assert Sampler(SamplingParams()).sample(np.ones(9, np.float32)).token == 0


def test_a_nucleus_wider_than_the_candidates_looked_at_first() -> None:
    flat = np.zeros(4 * NUCLEUS_CANDIDATES, np.float32)
    tokens = draw(flat, count=10_000, top_p=0.5)
    assert max(tokens) == 2 * NUCLEUS_CANDIDATES - 1, "half of the vocabulary, the lower ids"
    assert len(set(tokens)) > NUCLEUS_CANDIDATES * 1.9


def test_greedy_takes_the_likeliest() -> None:
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=5, top_p=0.5, seed=3),
        SamplingParams(temperature=2.0, top_k=1),
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e-300),
        SamplingParams(seed=4),
    ):
        assert params.is_greedy
        sampler = Sampler(params)
        assert [sampler.sample(LOGITS).token for _ in range(20)] == [1] * 20


def test_without_a_temperature_top_k_or_top_p_mean_sampling_at_1() -> None:
    choices: tuple[dict[str, Any], ...] = ({"top_k": 3}, {"top_p": 0.9})
    for params in choices:
        assert not SamplingParams(**params).is_greedy
        assert draw(LOGITS, temperature=None, **params) == draw(LOGITS, temperature=1.0, **params)


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e3, 1e30, 3e38])
def test_extreme_temperatures(temperature: float) -> None:
    tokens = draw(np.array([0, 80, -80, 79.9], np.float32), count=300, temperature=temperature)
    assert set(tokens) == ({1} if temperature < 1 else {0, 1, 2, 3})


def test_the_seed_decides_the_tokens() -> None:
    first = draw(LOGITS, 50, seed=11)
    assert draw(LOGITS, 50, seed=11) == first
    assert draw(LOGITS, 50, seed=12) != first
    assert draw(LOGITS, 50, seed=2**64 - 1) == draw(LOGITS, 50, seed=2**64 - 1)
    assert draw(LOGITS, 50, seed=None) != draw(LOGITS, 50, seed=None)


def test_another_sampler_s_draws_change_nothing() -> None:
    alone = draw(LOGITS, 50)
    samplers = [Sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in (7, 8)]
    together = [[sampler.sample(LOGITS).token for sampler in samplers] for _ in range(50)]
    assert [pair[0] for pair in together] == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 2}])
def test_logits_that_cannot_be_sampled(bad: float, params: dict[str, Any]) -> None:
    logits = LOGITS.copy()
    if bad == -math.inf:
        logits[:] = bad
    else:
        logits[4] = bad
    with pytest.raises(SamplingError, match="not finite; the checkpoint or its precision is at fault"):
        Sampler(SamplingParams(**params)).sample(logits)


def test_a_token_ruled_out_by_minus_infinity_never_comes() -> None:
    logits = LOGITS.copy()
    logits[1] = -math.inf
    for params in ({}, {"top_k": 5}, {"top_p": 0.99}):
        assert 1 not in draw(logits, **params)


def test_the_logits_are_left_as_they_were() -> None:
    logits = LOGITS.copy()
    draw(logits, 3, top_k=3, top_p=0.5, temperature=0.5)
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
        ({"max_tokens": -5}, "max_tokens is -5, must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1, must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1, must be at least 1, or 0 for all tokens"),
        ({"top_p": 0.0}, "top_p is 0.0, must be above 0 and at most 1"),
        ({"top_p": -1.0}, "top_p is -1.0"),
        ({"top_p": 1.0001}, "top_p is 1.0001"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_parameters_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError) as error:
        SamplingParams(**params)
    assert message in str(error.value)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(0.01, 10),
    st.integers(0, 50),
    st.floats(0.01, 1),
)
def test_only_tokens_of_positive_probability_come(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    array = np.array(logits, np.float32)
    expected = probabilities(logits, temperature, top_k, min(1.0, top_p + 1e-3))
    for token in draw(array, 5, temperature=temperature, top_k=top_k, top_p=top_p):
        # Ties in float32 may be none in float64.
        assert expected[token] > 0 or array[token] >= min(a for a, p in zip(array, expected, strict=True) if p) - 1e-4
