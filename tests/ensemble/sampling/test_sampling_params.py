"""Every value of every parameter is taken or refused in one line; none crashes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.ensemble.sampling import Sampler, SamplingError, SamplingParams
from deepseek_triton.ensemble.sampling.params import RANGES

INTEGERS = {field: allowed for field, allowed in RANGES.items() if allowed.is_whole}
FLOATS = {field: allowed for field, allowed in RANGES.items() if not allowed.is_whole}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
        ({"max_tokens": -5}, "max_tokens is -5, must be at least 1"),
        ({"min_tokens": -1}, "min_tokens is -1, must be at least 0"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens is 6, must be at most max_tokens, 5"),
        ({"temperature": -0.1}, "temperature is -0.1, must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1, must be at least 1, or 0 for all tokens"),
        ({"top_p": 0.0}, "top_p is 0.0, must be above 0 and at most 1"),
        ({"top_p": -1.0}, "top_p is -1.0"),
        ({"top_p": 1.0001}, "top_p is 1.0001"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1, must be 0 to 1"),
        ({"min_p": 1.1}, "min_p is 1.1, must be 0 to 1"),
        ({"seed": -1}, "seed is -1, must be at least 0 and below 2**64"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, must be a finite number above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan, must be a finite number"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty is -inf, must be a finite number"),
        ({"end_id": -2}, "end_id is -2, must be a token id, or -1 for none"),
        ({"num_log_probs": 21}, "num_log_probs is 21, must be 0 to 20"),
        ({"num_log_probs": -1}, "num_log_probs is -1"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0, must be 1 to 64"),
        ({"num_return_sequences": 65, "temperature": 1.0}, "num_return_sequences is 65"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2, but greedy sequences would all be equal; give a"),
        ({"num_return_sequences": 2, "temperature": 0.0, "top_p": 0.5}, "num_return_sequences is 2, but"),
    ],
)
def test_parameters_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError) as error:
        SamplingParams(**params)
    assert message in str(error.value)


def test_every_field_has_a_range() -> None:
    assert set(INTEGERS) | set(FLOATS) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 5, "max_tokens": 5},
        {"min_tokens": 5},
        {"top_p": 1.0, "min_p": 1.0, "temperature": 3.4e38, "seed": 2**64 - 1},
        {"repetition_penalty": 1e-45, "presence_penalty": -3.4e38, "frequency_penalty": 3.4e38},
        {"num_log_probs": 20, "num_return_sequences": 64, "top_k": 2**31 - 1},
        {"end_id": -1},
    ],
)
def test_parameters_at_the_edge_of_their_range(params: dict[str, Any]) -> None:
    kept = dataclasses.asdict(SamplingParams(**params))
    assert {name: kept[name] for name in params} == params


def test_end_ids() -> None:
    model = frozenset({1, 2})
    assert SamplingParams().effective_end_ids(model) == {1, 2}
    assert SamplingParams(end_id=7).effective_end_ids(model) == {7}
    assert SamplingParams(end_id=0).effective_end_ids(model) == {0}
    assert SamplingParams(end_id=-1).effective_end_ids(model) == frozenset()


INTEGER = st.one_of(st.integers(-3, 100), st.integers(-(2**70), 2**70))
FLOAT = st.one_of(
    st.floats(0, 2), st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 5e-324, 1e-45, 3.4e38, 1e308, -1e308])
)


@pytest.mark.slow
@settings(max_examples=500)
@given(
    st.fixed_dictionaries({}, optional={**dict.fromkeys(INTEGERS, INTEGER), **dict.fromkeys(FLOATS, FLOAT)}),
    st.lists(st.floats(width=32), min_size=1, max_size=12),
)
def test_no_value_crashes(params: dict[str, Any], logits: list[float]) -> None:
    try:
        sampler = Sampler(SamplingParams(**params), [0, 0, len(logits) - 1], frozenset({0}))
        for _ in range(4):
            sampled = sampler.sample(np.array(logits, np.float32))
            assert 0 <= sampled.token < len(logits)
            assert logits[sampled.token] > -math.inf
    except SamplingError as error:
        assert "\n" not in str(error) and len(str(error)) < 200


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.integers(int(r.low), int(min(r.high, 200)))
            for name, r in INTEGERS.items()
            if name not in ("num_return_sequences", "max_tokens")
        }
        | {name: st.floats(r.low, r.high, exclude_min=r.excludes_low) for name, r in FLOATS.items()},
    ),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=12),
)
def test_all_values_in_range_give_tokens(params: dict[str, Any], logits: list[float]) -> None:
    sampler = Sampler(SamplingParams(**params), [0, 0, len(logits) - 1], frozenset({1}))
    for _ in range(4):
        sampled = sampler.sample(np.array(logits, np.float32))
        assert 0 <= sampled.token < len(logits)
        if sampled.log_prob is not None:
            assert -math.inf < sampled.log_prob <= 0
