"""Fakes of the expensive things: a runner whose next token is a function of everything in its slot's cache."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from zlib import crc32

import numpy as np

from ensemble.engine.runners.base import Ids as IdArray
from ensemble.engine.runners.base import Logits
from ensemble.engine.sequence import Sequence


class FakeRunner:
    """Deterministic: a wrong slot, position or cache content gives other tokens."""

    def __init__(self, num_slots: int = 4, max_seq_len: int = 64, vocab_size: int = 100) -> None:
        self.num_slots, self.max_seq_len, self.vocab_size = num_slots, max_seq_len, vocab_size
        self.cache = np.full((num_slots, max_seq_len), -1, np.int64)
        self.calls: list[tuple[str, int]] = []
        self.fail_next: Exception | None = None
        self.is_closed = False

    def prefill(self, slot: int, ids: IdArray, start: int) -> Logits:
        self._maybe_fail()
        self.calls.append(("prefill", len(ids)))
        self.cache[slot, start : start + len(ids)] = ids
        return self._logits(slot, start + len(ids))

    def decode(self, ids: IdArray, positions: IdArray) -> Logits:
        self._maybe_fail()
        self.calls.append(("decode", len(ids)))
        rows = []
        for slot, (token, position) in enumerate(zip(ids, positions, strict=True)):
            self.cache[slot, position] = token
            rows.append(self._logits(slot, int(position) + 1))
        return np.stack(rows)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        self.calls.append(("copy_prefix", num_tokens))
        self.cache[target, :num_tokens] = self.cache[source, :num_tokens]

    def close(self) -> None:
        self.is_closed = True

    def _logits(self, slot: int, length: int) -> Logits:
        logits = np.zeros(self.vocab_size, np.float32)
        logits[next_token(self.cache[slot, :length].tolist(), self.vocab_size)] = 1.0
        return logits

    def _maybe_fail(self) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error


def next_token(history: Ids[int], vocab_size: int = 100) -> int:
    """What FakeRunner makes of a history; 0 never comes, so that it can serve as the end token."""
    return 1 + crc32(repr(list(history)).encode()) % (vocab_size - 1)


def expected_tokens(prompt: Ids[int], count: int, vocab_size: int = 100) -> list[int]:
    """The `count` tokens FakeRunner generates after `prompt`."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, vocab_size))
    return history[len(prompt) :]


class FakeSink:
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.responses: list[list[int]] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.has_gone = False

    def send(self, sequence: Sequence, ids: Ids[int]) -> None:
        assert self.finish_reason is None and self.error is None, "sent after the end"
        self.responses.append(list(ids))
        self.finish_reason = sequence.finish_reason

    def fail(self, message: str) -> None:
        assert self.finish_reason is None and self.error is None, "failed after the end"
        self.error = message

    def is_cancelled(self) -> bool:
        return self.has_gone

    @property
    def ids(self) -> list[int]:
        return [token for response in self.responses for token in response]


class FakeAcknowledgements:
    """Acknowledges what the test puts into it."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def drain(self) -> list[int]:
        received, self.received = self.received, []
        return received
