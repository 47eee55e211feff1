"""Tracks a sequence's reasoning section and enforces the thinking budget.

Reasoning models write `<think>` … `</think>` before their answer; each tag is one token. This module knows token ids
only; the detokenizer separates the reasoning's text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThinkingTags:
    """The ids of `<think>` and `</think>`."""

    open_id: int
    close_id: int


class Thinking:
    """The state of one sequence's reasoning.

    Args:
        tags: ids of the tags.
        is_open: whether the prompt ends inside `<think>`.
        budget: number of reasoning tokens after which `</think>` is forced; None: no limit.
    """

    def __init__(self, tags: ThinkingTags, *, is_open: bool, budget: int | None = None) -> None:
        self.is_open = is_open
        self._tags = tags
        self._budget = budget
        self._num_tokens = 0
        self._is_at_start = not is_open

    @property
    def num_tokens(self) -> int:
        """The number of reasoning tokens so far, without the tags."""
        return self._num_tokens

    @property
    def forced_token(self) -> int | None:
        """The token that must come next; None if the model chooses."""
        is_spent = self._budget is not None and self._num_tokens >= self._budget
        return self._tags.close_id if self.is_open and is_spent else None

    def may_force(self, num_unknown: int = 0) -> bool:
        """Return whether a token may have to be forced after `num_unknown` tokens that aren't known yet."""
        if self._budget is None or not (self.is_open or (num_unknown and self._is_at_start)):
            return False
        return self._num_tokens + num_unknown >= self._budget

    def push(self, token: int) -> None:
        """Append the sequence's next token."""
        if self._is_at_start and token == self._tags.open_id:
            self.is_open = True
        elif token == self._tags.close_id:
            self.is_open = False
        elif self.is_open:
            self._num_tokens += 1
        self._is_at_start = False
