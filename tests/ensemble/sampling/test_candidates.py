"""Filtering by top_k, top_p and min_p, compared with transformers and plain sorting; and sampling after it."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepseek_triton.ensemble.sampling import Sampler, SamplingParams
from deepseek_triton.ensemble.sampling.candidates import NUCLEUS_CANDIDATES, candidates, largest, sample_index


def random_scores(seed: int, size: int, scale: float) -> NDArray[np.float32]:
    logits = np.random.default_rng(seed).normal(size=size, scale=scale).astype(np.float32)
    scores: NDArray[np.float32] = logits - logits.max()
    return scores


@pytest.mark.slow
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


@pytest.mark.slow
@settings(max_examples=200)
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


@pytest.mark.slow
@settings(max_examples=300)
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


@pytest.mark.slow
@settings(max_examples=300)
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
    index = sample_index(weights, uniform)
    sums = np.cumsum(weights, dtype=np.float64)
    tolerance = 1e-12 * sums[-1]
    assert weights[index] > 0
    assert (sums[index - 1] if index else 0.0) - tolerance <= uniform * sums[-1] <= sums[index] + tolerance


def test_rounding_never_draws_a_weight_of_0() -> None:
    """The largest number that a draw can have, and ruled out tokens last: block sums and running sums round apart."""
    for seed in range(500):
        weights = np.exp(np.random.default_rng(seed).normal(size=700, scale=6)).astype(np.float32)
        weights[650:] = 0
        assert weights[sample_index(weights, math.nextafter(1, 0))] > 0


@pytest.mark.parametrize(
    ("params", "most"),
    [
        ({}, 0.01),
        ({"temperature": 0.8, "top_k": 40}, 0.5),
        ({"temperature": 0.8}, 2),
        ({"temperature": 0.8, "top_p": 0.9}, 2),
    ],
)
def test_sampling_copies_the_vocabulary_no_more_often_than_it_must(params: dict[str, Any], most: float) -> None:
    """The greatest memory taken, in rows of logits: greedily and with top_k not even one row is copied."""
    logits = np.random.default_rng(0).normal(size=150_000, scale=3).astype(np.float32)
    sampler = Sampler(SamplingParams(seed=1, **params))
    sampler.sample(logits)
    tracemalloc.start()
    sampler.sample(logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most * logits.nbytes
