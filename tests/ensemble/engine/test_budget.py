"""The prefill budget on simulated machines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.engine.budget import FIRST_TOKENS, MIN_TOKENS, SPARE, PrefillBudget

TIME = st.floats(0, 100, allow_nan=False)


def run(budget: PrefillBudget, decode_s: float, token_s: float, num_steps: int, overhead_s: float = 0.0) -> list[int]:
    """Steps of a machine whose prefill costs `overhead_s` and `token_s` a token, with prompts always waiting."""
    counts = []
    for _ in range(num_steps):
        budget.observe_decode(decode_s)
        counts.append(budget.tokens(is_decoding=True))
        budget.observe_prefill(counts[-1], overhead_s + counts[-1] * token_s)
    return counts


@pytest.mark.slow
@given(
    decode_s=st.floats(1e-4, 1), tokens_allowed=st.floats(MIN_TOKENS, 10_000), max_stall=st.floats(0.1, 10),
    chunk=st.integers(1, 4096),
)  # fmt: skip
def test_it_finds_what_the_machine_can_do_in_the_allowed_time(
    decode_s: float, tokens_allowed: float, max_stall: float, chunk: int
) -> None:
    token_s = max_stall * decode_s / tokens_allowed
    for count in run(PrefillBudget(chunk, max_stall), decode_s, token_s, 100)[50:]:
        assert count * token_s <= max_stall * decode_s * (1 + 1e-9)
        assert count == chunk or count * token_s >= SPARE * max_stall * decode_s * (1 - 1e-9) or count <= MIN_TOKENS


def test_the_cost_of_a_call_is_part_of_it() -> None:
    counts = run(PrefillBudget(512, 1.5), decode_s=0.03, token_s=0.0005, num_steps=100, overhead_s=0.01)
    assert all(0.01 + count * 0.0005 <= 1.5 * 0.03 for count in counts[50:])
    assert min(counts[50:]) >= 40, "of the 70 that would fit"


def test_it_follows_a_machine_that_changes() -> None:
    budget = PrefillBudget(512, 1.0)
    fast = run(budget, 0.1, 0.001, 60)[-1]
    slow = run(budget, 0.1, 0.01, 5)[-1]
    again = run(budget, 0.1, 0.001, 60)[-1]
    assert 80 <= fast <= 100 and 8 <= slow <= 10 and 80 <= again <= 100


@pytest.mark.parametrize("chunk", [1, 3, 64, 512])
def test_alone_a_prompt_has_all_of_the_chunk(chunk: int) -> None:
    budget = PrefillBudget(chunk, 1.5)
    assert budget.tokens(is_decoding=False) == chunk
    assert budget.tokens(is_decoding=True) == min(FIRST_TOKENS, chunk), "before anything is known"
    run(budget, 0.001, 1.0, 20)
    assert budget.tokens(is_decoding=False) == chunk


@pytest.mark.slow
@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.just("decode"), TIME) | st.tuples(st.integers(0, 200), TIME), max_size=40),
)
def test_whatever_it_sees_it_stays_between_one_token_and_the_chunk(
    chunk: int, events: list[tuple[object, float]]
) -> None:
    budget = PrefillBudget(chunk, 1.5)
    for what, seconds in events:
        if isinstance(what, int):
            budget.observe_prefill(what, seconds)
        else:
            budget.observe_decode(seconds)
        assert min(MIN_TOKENS, chunk) <= budget.tokens(is_decoding=True) <= chunk
        assert budget.tokens(is_decoding=False) == chunk


def test_a_short_prompt_is_no_reason_to_grow() -> None:
    budget = PrefillBudget(512, 1.5)
    budget.observe_decode(0.1)
    for _ in range(20):
        budget.observe_prefill(FIRST_TOKENS - 1, 0.001)
    assert budget.tokens(is_decoding=True) == FIRST_TOKENS


def test_an_upper_bound_only_lowers_what_a_decode_takes() -> None:
    budget = PrefillBudget(512, 1.5)
    budget.observe_decode(0.03, at_most=True)
    assert budget.decode_s == 0.03
    budget.observe_decode(0.05, at_most=True)
    assert budget.decode_s == 0.03
    budget.observe_decode(0.01, at_most=True)
    assert budget.decode_s == 0.01
    budget.observe_decode(0.02)
    assert 0.01 < budget.decode_s < 0.02
