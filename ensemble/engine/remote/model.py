"""What the loop knows of the model that computes: its limits, and how to ask it. A fake takes its place in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deepseek_triton.ensemble.sampling import Sampled


@dataclass(frozen=True)
class RemoteModel:
    """The limits of a model that another backend runs.

    max_num_seqs: sequences that it is asked for at once. max_seq_len, vocab_size: in tokens.
    """

    max_num_seqs: int
    max_seq_len: int
    vocab_size: int


@dataclass(frozen=True)
class RemoteTokens:
    """The new tokens of one sequence, and with the last ones why it ended there: "stop", "length" or another word."""

    tokens: tuple[Sampled, ...]
    finish_reason: str | None = None


class RemoteError(Exception):
    """The other model couldn't answer; one line."""


class Ask(Protocol):
    """Asks the other model for one sequence."""

    def __call__(
        self, text: str, parameters: Mapping[str, Any], is_wanted: Callable[[], bool]
    ) -> Iterator[RemoteTokens]:
        """Yield the tokens that follow `text` as they come; blocks between them.

        is_wanted: asked after each response; once it says no, the sequence is cancelled where the server can do so.

        Raises:
            RemoteError: the model refused the request, or failed.
        """
