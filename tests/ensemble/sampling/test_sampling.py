from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.base import DeviceSampling
from deepseek_triton.ensemble.sampling import Sampler, SamplingError, SamplingParams
from deepseek_triton.ensemble.sampling.candidates import NUCLEUS_CANDIDATES
from deepseek_triton.ensemble.sampling.sampler import MAX_CHECKED
from deepseek_triton.ensemble.sampling.seeds import CounterRandom, sequence_seed

Logits = NDArray[np.float32]
LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.15, 0.05], np.float32)) + np.float32(3)
DRAWS = 4000
FEW = 400  # enough to see every token of a probability of 0.1: one is missed once in 10¹⁸ seeds


def probabilities(
    logits: Iterable[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """The distribution by its definition, token by token."""
    logits = list(logits)
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if top_k:
        order = order[:top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if weights[i] < min_p:  # of the likeliest one's, which is 1
            break
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


@pytest.mark.slow
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
        {"min_p": 0.3},
        {"min_p": 0.1, "temperature": 3.0},
        {"top_k": 4, "top_p": 0.95, "min_p": 0.4},
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
    assert set(draw(LOGITS, FEW, top_k=3, top_p=0.81)) == {1, 3}
    assert set(draw(LOGITS, FEW, top_k=3, top_p=0.82)) == {1, 3, 4}
    assert set(draw(LOGITS, FEW, top_p=0.81)) == {1, 3, 4, 2}


@pytest.mark.slow
def test_the_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    even = np.zeros(4, np.float32)  # exactly a quarter each
    assert set(draw(even, FEW, top_p=0.25)) == {0}
    assert set(draw(even, FEW, top_p=0.5)) == {0, 1}
    assert set(draw(even, FEW, top_p=0.51)) == {0, 1, 2}
    assert set(draw(even, FEW, top_p=1e-9)) == {0}
    assert set(draw(even, FEW, top_p=math.nextafter(1, 0))) == {0, 1, 2, 3}


@pytest.mark.slow
def test_of_equal_tokens_the_lower_ids_are_kept() -> None:
    even = np.zeros(5000, np.float32)
    even[[10, 3000]] = 1.0
    assert set(draw(even, FEW, top_k=1)) == {10}
    assert set(draw(even, FEW, top_k=2)) == {10, 3000}
    assert set(draw(even, FEW, top_k=5)) == {0, 1, 2, 10, 3000}
    assert Sampler(SamplingParams()).sample(np.ones(9, np.float32)).token == 0


@pytest.mark.slow
def test_a_nucleus_wider_than_the_candidates_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = np.zeros(4 * NUCLEUS_CANDIDATES, np.float32)
    count = 2 * NUCLEUS_CANDIDATES
    # One number in the middle of each token's share instead of random ones.
    monkeypatch.setattr(CounterRandom, "uniform", lambda self, step, attempt=0: (step + 0.5) / count)
    tokens = draw(flat, count, top_p=0.5)
    assert tokens == list(range(count)), "half of the vocabulary, the lower ids, each as often"


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


@pytest.mark.slow
def test_without_a_temperature_top_k_top_p_or_min_p_mean_sampling_at_1() -> None:
    choices: tuple[dict[str, Any], ...] = ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2})
    for params in choices:
        assert not SamplingParams(**params).is_greedy
        assert draw(LOGITS, FEW, temperature=None, **params) == draw(LOGITS, FEW, temperature=1.0, **params)


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


def test_a_sampled_token_depends_on_seed_and_step_alone() -> None:
    """A sequence that was taken out, or whose first tokens a runner sampled, goes on with the same tokens."""
    whole = draw(LOGITS, 50)
    resumed = Sampler(SamplingParams(temperature=1.0, seed=7))
    for _ in range(20):
        resumed.push(4)
    assert [resumed.sample(LOGITS).token for _ in range(30)] == whole[20:]


def test_samples_of_one_prompt() -> None:
    params = SamplingParams(temperature=1.0, seed=7, num_return_sequences=3)
    texts = []
    for index in range(3):
        sampler = Sampler(params, index=index)
        texts.append([sampler.sample(LOGITS).token for _ in range(60)])
    assert texts[0] == draw(LOGITS, 60)
    assert len({tuple(text) for text in texts}) == 3
    again = Sampler(params, index=2)
    assert [again.sample(LOGITS).token for _ in range(60)] == texts[2]


@pytest.mark.parametrize("vary", ["step", "seed", "index", "attempt"])
def test_random_numbers_are_even_and_unlike_their_neighbours(vary: str) -> None:
    def number(i: int) -> float:
        if vary == "seed":
            return CounterRandom(i).uniform(3)
        if vary == "index":
            return CounterRandom(sequence_seed(11, i)).uniform(0)
        return CounterRandom(2**64 - 1).uniform(*((i, 0) if vary == "step" else (5, i)))

    numbers = np.array([number(i) for i in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert chi_square((numbers * 10).astype(int).tolist(), [0.1] * 10) < 33.7  # 9 degrees of freedom, once in 10,000
    pairs = (numbers[:-1] * 4).astype(int) * 4 + (numbers[1:] * 4).astype(int)
    assert chi_square(pairs.tolist(), [1 / 16] * 16) < 44.3  # 15 degrees of freedom


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 2}])
def test_logits_that_cannot_be_sampled(bad: float, params: dict[str, Any]) -> None:
    logits = LOGITS.copy()
    if bad == -math.inf:
        logits[:] = bad
    else:
        logits[4] = bad
    with pytest.raises(SamplingError, match="not finite; check the checkpoint and its precision"):
        Sampler(SamplingParams(**params)).sample(logits)


@pytest.mark.slow
def test_a_token_ruled_out_by_minus_infinity_never_comes() -> None:
    logits = LOGITS.copy()
    logits[1] = -math.inf
    for params in ({}, {"top_k": 5}, {"top_p": 0.99}):
        assert 1 not in draw(logits, **params)


def test_the_logits_are_left_as_they_were() -> None:
    logits = LOGITS.copy()
    logits.flags.writeable = False
    draw(logits, 3, top_k=3, top_p=0.5, temperature=0.5)
    draw(logits, 3, min_p=0.1)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5, min_tokens=9, num_log_probs=2), [1, 2], frozenset({3}))
    sampler.sample(logits, np.array([0b111010], np.uint32), lambda token: token != 1)
    np.testing.assert_array_equal(logits, LOGITS)


# --- What may not come


def test_no_end_token_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=3)
    sampler = Sampler(params, end_ids=frozenset({1, 3, 999}))  # the likeliest two, and one past the vocabulary
    assert [sampler.sample(LOGITS).token for _ in range(5)] == [4, 4, 4, 1, 1]
    sampler = Sampler(SamplingParams(min_tokens=3, end_id=4), end_ids=frozenset({1, 3}))
    assert sampler.end_ids == {4}
    assert [sampler.sample(LOGITS).token for _ in range(2)] == [1, 1]
    assert Sampler(SamplingParams(end_id=-1), end_ids=frozenset({1, 3})).end_ids == frozenset()


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_a_mask_says_which_tokens_may_come(dtype: type[np.generic]) -> None:
    logits = np.zeros(70, np.float32)
    logits[[5, 33, 69]] = [3, 2, 1]
    for allowed, expected in (({5, 33, 69}, 5), ({33, 69}, 33), ({31, 32, 69}, 69), ({7, 40}, 7)):
        mask = np.zeros(3, np.uint32)
        for token in allowed:
            mask[token // 32] |= np.uint32(1) << np.uint32(token % 32)
        assert Sampler(SamplingParams()).sample(logits, mask.view(dtype)).token == expected
        sampler = Sampler(SamplingParams(temperature=5.0, seed=1))
        assert {sampler.sample(logits, mask.view(dtype)).token for _ in range(100)} == allowed
    # Ids past the mask's end are none of the tokenizer's.
    assert Sampler(SamplingParams()).sample(logits[::-1].copy(), np.array([2**32 - 1], np.uint32)).token == 0


def test_a_step_that_allows_nothing() -> None:
    message = "no token is allowed here: min_tokens, guided decoding and bad_words exclude all"
    only_3 = np.array([0b1000], np.uint32)
    for params in (SamplingParams(min_tokens=2), SamplingParams(min_tokens=2, top_p=0.5)):
        with pytest.raises(SamplingError, match=message):
            Sampler(params, end_ids=frozenset({3})).sample(LOGITS, only_3)
        with pytest.raises(SamplingError, match=message):
            Sampler(params).sample(LOGITS, only_3, lambda token: False)


@pytest.mark.slow
@pytest.mark.parametrize("refused", [{1}, {1, 4}, {0, 1, 5}])
@pytest.mark.parametrize("params", [{}, {"temperature": 2.0}, {"top_p": 0.9}, {"top_k": 4}])
def test_tokens_come_as_often_as_before_when_others_are_refused(refused: set[int], params: dict[str, Any]) -> None:
    before = probabilities(LOGITS.tolist(), **params)
    total = sum(p for token, p in enumerate(before) if token not in refused)
    expected = [0.0 if token in refused else p / total for token, p in enumerate(before)]
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 5, **params}))
    tokens = [sampler.sample(LOGITS, is_allowed=lambda token: token not in refused).token for _ in range(DRAWS)]
    assert chi_square(tokens, expected) < LIMIT


@pytest.mark.slow
def test_tokens_come_as_often_as_before_when_many_are_refused() -> None:
    """More than are drawn again one by one."""
    logits = np.zeros(200, np.float32)
    logits[190:] = LOGITS[[1, 3] * 5] - 3
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5))
    tokens = [sampler.sample(logits, is_allowed=lambda token: token >= 190).token for _ in range(DRAWS)]
    counts = [tokens.count(token) for token in range(190, 200)]
    expected = [share / 5 for share in (0.4 / 0.65, 0.25 / 0.65)] * 5
    assert sum(counts) == DRAWS
    assert chi_square(np.repeat(range(10), counts).tolist(), expected) < 33.7  # 9 degrees of freedom


def test_where_none_of_those_drawn_among_is_allowed_the_likeliest_is_taken() -> None:
    for params in ({}, {"top_k": 2, "seed": 1}, {"top_p": 0.5, "seed": 1}, {"min_p": 0.5, "seed": 1}):
        sampler = Sampler(SamplingParams(**params))
        assert sampler.sample(LOGITS, is_allowed=lambda token: token not in (1, 3)).token == 4


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 2}, {"top_k": 5, "seed": 2}])
def test_a_rule_that_refuses_nearly_everything(params: dict[str, Any]) -> None:
    logits = np.linspace(5, 0, 5000, dtype=np.float32)  # the lower the id, the likelier
    last = MAX_CHECKED - 1
    num_asked = 0

    def is_allowed(token: int) -> bool:
        nonlocal num_asked
        num_asked += 1
        return token in (last, 4999)

    assert Sampler(SamplingParams(**params)).sample(logits, is_allowed=is_allowed).token in (last, 4999)
    assert num_asked <= 2 * MAX_CHECKED + 9
    with pytest.raises(SamplingError, match="no token is allowed"):
        Sampler(SamplingParams()).sample(logits, is_allowed=lambda token: token == 4999)


# --- Log probabilities


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_log_probabilities_are_the_models_own(count: int) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=1000, scale=4).astype(np.float32)
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    order = np.argsort(-expected)
    params = SamplingParams(temperature=3.0, top_k=50, seed=3, repetition_penalty=2.0, num_log_probs=count)
    sampler = Sampler(params, prompt_ids=order[:5].tolist())
    chosen = set()
    for _ in range(20):
        sampled = sampler.sample(logits)
        chosen.add(sampled.token)
        assert sampled.log_prob == pytest.approx(expected[sampled.token], abs=1e-5)
        assert [token for token, _ in sampled.top] == order[:count].tolist()
        assert [log_prob for _, log_prob in sampled.top] == pytest.approx(expected[order[:count]].tolist(), abs=1e-5)
    assert len(chosen) > 5


def test_log_probabilities_of_greedy_far_apart_and_few() -> None:
    assert Sampler(SamplingParams()).sample(LOGITS) == (1, None, ())
    token, log_prob, top = Sampler(SamplingParams(num_log_probs=20)).sample(LOGITS)
    assert (token, len(top)) == (1, len(LOGITS))
    assert log_prob == pytest.approx(math.log(0.4), abs=1e-6) and top[0] == (1, log_prob)
    logits = np.array([1e30, 0, -1e30, -np.inf], np.float32)
    sampled = Sampler(SamplingParams(num_log_probs=4)).sample(logits)
    assert sampled.log_prob == 0 and [p for _, p in sampled.top] == pytest.approx([0, -1e30, -2e30, -math.inf])


# --- What a runner can sample


def test_a_runner_gets_all_parameters_or_none() -> None:
    sampler = Sampler(SamplingParams(top_k=4, top_p=0.8, min_p=0.1, seed=9))
    assert sampler.device_sampling() == DeviceSampling(temperature=1.0, top_k=4, top_p=0.8, min_p=0.1, seed=9, step=0)
    sampler.push(3)
    sampler.sample(LOGITS)
    assert sampler.device_sampling() == DeviceSampling(temperature=1.0, top_k=4, top_p=0.8, min_p=0.1, seed=9, step=2)
    greedy = Sampler(SamplingParams(temperature=1e-9, top_p=0.5, seed=9)).device_sampling()
    assert greedy is not None and greedy.temperature == 0
    assert Sampler(SamplingParams(num_log_probs=0, max_tokens=3)).device_sampling() is not None
    more: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"num_log_probs": 1},
    )
    for params in more:
        assert Sampler(SamplingParams(**params)).device_sampling() is None


def test_a_runner_may_draw_once_the_end_is_allowed() -> None:
    sampler = Sampler(SamplingParams(min_tokens=1), end_ids=frozenset({3}))
    assert sampler.device_sampling() is None
    sampler.push(5)
    assert sampler.device_sampling() is not None
    assert Sampler(SamplingParams(min_tokens=1, end_id=-1), end_ids=frozenset({3})).device_sampling() is not None


def test_the_samples_of_a_request_differ_in_their_seed() -> None:
    seeds = set()
    for index in range(64):
        params = SamplingParams(temperature=1.0, seed=2**64 - 1, num_return_sequences=64)
        sampling = Sampler(params, index=index).device_sampling()
        assert sampling is not None and 0 <= sampling.seed < 2**64
        seeds.add(sampling.seed)
    assert len(seeds) == 64 and 2**64 - 1 in seeds


@pytest.mark.slow
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
