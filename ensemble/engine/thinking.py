"""Where a sequence's reasoning ends, by its tokens, and the budget that ends it.

Reasoning models write `<think>` … `</think>` before their answer, each tag one token. It knows token ids only; what the
client sees of the reasoning is the detokenizer's business.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThinkingTags:
    """The ids of `<think>` and `</think>`."""

    open_id: int
    close_id: int


class Thinking:
    """Follows one sequence's tokens.

    Args:
        is_open: the prompt ends inside `<think>`.
        budget: tokens of reasoning after which `</think>` is forced; None: as many as the model likes.
    """

    def __init__(self, tags: ThinkingTags, *, is_open: bool, budget: int | None = None) -> None:
        self.is_open = is_open
        self._tags = tags
        self._budget = budget
        self._num_tokens = 0
        self._is_at_start = not is_open

    @property
    def forced_token(self) -> int | None:
        """The token that must come next, whatever the model says; None: its choice."""
        is_spent = self._budget is not None and self._num_tokens >= self._budget
        return self._tags.close_id if self.is_open and is_spent else None

    def may_force(self, num_unknown: int = 0) -> bool:
        """Whether a token may be forced behind the next `num_unknown`, whatever they are."""
        if self._budget is None or not (self.is_open or (num_unknown and self._is_at_start)):
            return False
        return self._num_tokens + num_unknown >= self._budget

    def push(self, token: int) -> None:
        """Take the sequence's next token."""
        if self._is_at_start and token == self._tags.open_id:
            self.is_open = True
        elif token == self._tags.close_id:
            self.is_open = False
        elif self.is_open:
            self._num_tokens += 1
        self._is_at_start = False
