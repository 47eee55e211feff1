"""What a runner is: the only thing the scheduler, the loop and their tests know of a model.

A runner owns `num_slots` caches of `max_seq_len` positions. It knows nothing of requests, sampling or text.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class RunnerError(Exception):
    """The runner can't be loaded, or a step failed; the message is one line."""


class Runner(Protocol):
    """A model with `num_slots` KV caches."""

    num_slots: int
    max_seq_len: int
    vocab_size: int

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        """Put `ids` [n] into `slot` at positions start, start + 1, … and return the last one's logits [vocab_size].

        The result is valid until the next call.
        """

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        """Put ids[i] into slot i at positions[i], for slots 0 … n - 1, and return their logits [n, vocab_size].

        An idle slot within the range is written too: give it a position past what it must keep. The result is valid
        until the next call.
        """

    def close(self) -> None:
        """Free the weights and the caches."""


@runtime_checkable
class GreedyRunner(Runner, Protocol):
    """A runner that can choose the likeliest token itself, where its logits are."""

    def decode_greedy(self, ids: Ids, positions: Ids) -> tuple[Ids, Logits]:
        """As `decode`, but gives each slot's likeliest token [n] and its logit [n]."""
