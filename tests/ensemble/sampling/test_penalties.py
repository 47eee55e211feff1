"""Penalties against transformers' processor and against their definitions in float64."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepseek_triton.ensemble.sampling import Sampler, SamplingParams
from deepseek_triton.ensemble.sampling.penalties import Penalties

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


@pytest.mark.slow
@settings(max_examples=300)
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
