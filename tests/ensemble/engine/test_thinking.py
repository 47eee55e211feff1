from __future__ import annotations

import pytest

from deepseek_triton.ensemble.engine.thinking import Thinking, ThinkingTags

OPEN, CLOSE = 90, 91
TAGS = ThinkingTags(OPEN, CLOSE)


def states(tokens: list[int], *, is_open: bool, budget: int | None = None) -> list[tuple[bool, int | None]]:
    """Before each token and after the last: whether it reasons, and what is forced."""
    thinking = Thinking(TAGS, is_open=is_open, budget=budget)
    found = [(thinking.is_open, thinking.forced_token)]
    for token in tokens:
        thinking.push(token)
        found.append((thinking.is_open, thinking.forced_token))
    return found


@pytest.mark.parametrize(
    ("is_open", "tokens", "expected"),
    [
        (True, [1, 2, CLOSE, 3], [True, True, True, False, False]),
        (True, [OPEN, 1, CLOSE], [True, True, True, False]),  # written in vain
        (False, [OPEN, 1, CLOSE, 2], [False, True, True, False, False]),
        (False, [1, OPEN, 2], [False, False, False, False]),  # in the answer a tag is plain text
        (False, [CLOSE, OPEN], [False, False, False]),
        (True, [CLOSE, OPEN, 1], [True, False, False, False]),  # one section
    ],
)
def test_one_section_at_the_very_beginning(is_open: bool, tokens: list[int], expected: list[bool]) -> None:
    assert [state for state, _ in states(tokens, is_open=is_open)] == expected


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_the_budget_counts_tokens_of_reasoning_without_the_tags(is_open: bool, budget: int) -> None:
    tokens = [*([] if is_open else [OPEN]), *range(1, budget + 1)]
    *before, last = states(tokens, is_open=is_open, budget=budget)
    assert last == (True, CLOSE) and all(forced is None for _, forced in before)
    assert states([*tokens, CLOSE, 5, 6], is_open=is_open, budget=budget)[-1] == (False, None)


def test_without_a_budget_or_without_reasoning_nothing_is_forced() -> None:
    assert all(forced is None for _, forced in states([1] * 50, is_open=True))
    assert all(forced is None for _, forced in states([1] * 50, is_open=False, budget=0))


@pytest.mark.parametrize(
    ("is_open", "budget", "tokens", "expected"),
    [
        (True, None, [1, 2], [False, False, False]),
        (True, 2, [], [False, False, True]),
        (True, 2, [1], [False, True, True]),
        (True, 2, [1, 2], [True, True, True]),
        (True, 2, [1, CLOSE], [False, False, False]),
        (False, 1, [], [False, True, True]),  # the next may be <think>
        (False, 1, [1], [False, False, False]),
    ],
)
def test_what_may_be_forced_is_known_before_the_tokens_are(
    is_open: bool, budget: int | None, tokens: list[int], expected: list[bool]
) -> None:
    thinking = Thinking(TAGS, is_open=is_open, budget=budget)
    for token in tokens:
        thinking.push(token)
    assert [thinking.may_force(num_unknown) for num_unknown in range(3)] == expected
    assert thinking.may_force() == (thinking.forced_token is not None)
