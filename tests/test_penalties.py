"""Penalties and candidates against transformers' processors and against their definitions in float64."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ensemble.sampling import Sampler, SamplingParams
from ensemble.sampling.candidates import NUCLEUS_CANDIDATES, candidates, draw_index, largest
from ensemble.sampling.penalties import Penalties

VOCAB_SIZE = 500
IDS = st.lists(st.integers(0, 11), max_size=30)


def by_definition(
    logits: NDArray[np.float32], prompt: list[int], output: list[int], params: SamplingParams
) -> NDArray[np.float64]:
    values, counts = logits.astype(np.float64), Counter(output)
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token, count in counts.items():
        values[token] -= params.presence_penalty + params.frequency_penalty * count
    return values


@settings(max_examples=300, deadline=None)
@given(
    prompt=IDS,
    output=IDS,
    repetition=st.floats(0.125, 3, width=32),
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
    seed=st.integers(0, 2**32),
)
def test_penalties_by_their_definition(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float, seed: int
) -> None:
    params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    penalties = Penalties(params, prompt)
    for token in output:
        penalties.push(token)
    logits = np.random.default_rng(seed).normal(size=12, scale=5).astype(np.float32)
    logits[3] = -np.inf
    expected = by_definition(logits, prompt, output, params)
    penalties.apply(logits)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_exact_numbers() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    penalties = Penalties(params, [0, 1, 1])
    for token in (1, 2, 2, 2):
        penalties.push(token)
    logits = np.array([4.0, -4.0, 4.0, 4.0], np.float32)
    penalties.apply(logits)
    assert logits.tolist() == [2.0, -8.0 - 0.5 - 0.25, 2.0 - 0.5 - 0.75, 4.0]


def test_many_different_tokens() -> None:
    """More than any first guess at how much room they need."""
    params = SamplingParams(frequency_penalty=1.0)
    penalties, logits = Penalties(params, [5] * 10), np.zeros(1000, np.float32)
    for token in [*range(0, 1000, 2), *range(0, 1000, 4)]:
        penalties.push(token)
    penalties.apply(logits)
    assert logits.tolist() == [-2.0 if token % 4 == 0 else -1.0 if token % 2 == 0 else 0.0 for token in range(1000)]


def test_repetition_is_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(4)
    prompt, output = rng.integers(0, VOCAB_SIZE, 80).tolist(), rng.integers(0, VOCAB_SIZE, 40).tolist()
    for penalty in (0.5, 1.1, 1.3, 2.0):
        logits = rng.normal(size=VOCAB_SIZE, scale=5).astype(np.float32)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([prompt + output]), torch.from_numpy(logits.copy())[None]
        )[0].numpy()
        penalties = Penalties(SamplingParams(repetition_penalty=penalty), prompt)
        for token in output:
            penalties.push(token)
        ours = logits.copy()
        penalties.apply(ours)
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)
        assert (ours != logits).sum() == len({*prompt, *output})


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    sampler = Sampler(SamplingParams(presence_penalty=0.5), prompt_ids=[0, 0])
    assert [sampler.sample(logits).token for _ in range(4)] == [0, 1, 0, 0]
    sampler = Sampler(SamplingParams(frequency_penalty=0.5), prompt_ids=[0, 0])
    assert [sampler.sample(logits).token for _ in range(6)] == [0, 1, 0, 1, 0, 2]
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0, 0])
    assert [sampler.sample(logits).token for _ in range(2)] == [1, 0]


# --- Candidates


def random_scores(seed: int, size: int, scale: float) -> NDArray[np.float32]:
    logits = np.random.default_rng(seed).normal(size=size, scale=scale).astype(np.float32)
    scores: NDArray[np.float32] = logits - logits.max()
    return scores


@pytest.mark.parametrize("size", [50, 3000, 40_000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=7),
        SamplingParams(top_k=2000),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=0.99),
        SamplingParams(min_p=0.05),
        SamplingParams(top_k=40, top_p=0.9),
        SamplingParams(top_p=0.97, min_p=0.02),
        SamplingParams(top_k=1500, top_p=0.95, min_p=0.01),
    ],
)
def test_candidates_are_transformers(size: int, scale: float, params: SamplingParams) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = random_scores(size, size, scale)
    theirs = torch.from_numpy(scores.astype(np.float64))[None]
    if params.top_k:
        theirs = TopKLogitsWarper(params.top_k)(None, theirs)
    if params.top_p < 1:
        theirs = TopPLogitsWarper(params.top_p)(None, theirs)
    if params.min_p:
        theirs = MinPLogitsWarper(params.min_p)(None, theirs)
    expected = np.flatnonzero(np.isfinite(theirs[0].numpy()))
    ids, weights = candidates(scores.copy(), params)
    assert ids is not None
    assert sorted(ids.tolist()) == expected.tolist()
    np.testing.assert_allclose(weights, np.exp(scores[ids]), rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 9 * NUCLEUS_CANDIDATES),
    scale=st.sampled_from([0.0, 1e-3, 0.3, 3.0, 100.0]),
    decimals=st.sampled_from([0, 1, 7]),
    top_p=st.floats(0, 1, exclude_min=True, exclude_max=True),
    num_ruled_out=st.integers(0, 3000),
)
def test_the_nucleus_is_the_smallest_prefix_of_the_sorted_vocabulary(
    seed: int, size: int, scale: float, decimals: int, top_p: float, num_ruled_out: int
) -> None:
    """Wide or narrow, with ties and tokens of weight 0."""
    scores = random_scores(seed, size, scale).round(decimals)
    scores[: min(num_ruled_out, size - 1)] = -np.inf
    scores -= scores.max()
    weights = np.exp(scores).astype(np.float64)
    ids, _ = candidates(scores.copy(), SamplingParams(top_p=top_p))
    assert ids is not None
    order = np.argsort(-scores, kind="stable")
    assert sorted(ids.tolist()) == sorted(order[: len(ids)].tolist())
    needed, tolerance = top_p * weights.sum(), 1e-6 * weights.sum()
    assert weights[ids].sum() >= needed - tolerance
    assert weights[order[: len(ids) - 1]].sum() <= needed + tolerance


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 20_000),
    count=st.integers(1, 3000),
    decimals=st.sampled_from([0, 1, 7]),
)
def test_largest(seed: int, size: int, count: int, decimals: int) -> None:
    values = random_scores(seed, size, 2.0).round(decimals)
    values[seed % size] = -np.inf
    assert largest(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 3000),
    num_zeros=st.integers(0, 3000),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, math.nextafter(1, 0)])),
)
def test_the_draw_is_where_the_running_sum_passes_the_number(
    seed: int, size: int, num_zeros: int, uniform: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(size=size, scale=4)).astype(np.float32)
    weights[rng.permutation(size)[: min(num_zeros, size - 1)]] = 0
    index = draw_index(weights, uniform)
    sums = np.cumsum(weights, dtype=np.float64)
    tolerance = 1e-12 * sums[-1]
    assert weights[index] > 0
    assert (sums[index - 1] if index else 0.0) - tolerance <= uniform * sums[-1] <= sums[index] + tolerance
