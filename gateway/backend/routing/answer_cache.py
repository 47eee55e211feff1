"""AnswerCache: whole answers to requests that always have the same one, for times in which no server can answer."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from deepseek_triton.clients import Chunk, GenerateRequest, Generation

ENTRY_BYTES, TOKEN_BYTES = 512, 96  # what an answer takes beside its text, and each token that is told of


@dataclass(frozen=True)
class _Entry:
    answers: tuple[Generation, ...]
    num_bytes: int
    until: float


class AnswerCache:
    """Bounded by bytes and by age; the answer that was used last goes last.

    Args:
        max_bytes: of all answers; 0 keeps none.
        ttl_s: seconds for which an answer is kept.
        clock: monotonic time in seconds.
    """

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._ttl_s, self._clock = max_bytes, ttl_s, clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.num_bytes = 0

    def key(self, model: str, request: GenerateRequest) -> bytes | None:
        """What identical requests share; None: an answer to this one isn't kept, for the next may be another."""
        is_greedy = request.temperature == 0 or request.top_k == 1
        if not self._max_bytes or not is_greedy or request.num_sequences > 1:
            return None
        return hashlib.sha256(repr((model, request)).encode("utf-8", "backslashreplace")).digest()

    def put(self, key: bytes, answers: Sequence[Generation]) -> None:
        """Keep a whole answer."""
        if any(answer.finish_reason not in ("stop", "length") for answer in answers):
            return
        self._drop(key)
        num_bytes = sum(map(_size, answers))
        if num_bytes > self._max_bytes:
            return
        self._entries[key] = _Entry(tuple(answers), num_bytes, self._clock() + self._ttl_s)
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, key: bytes | None) -> tuple[Generation, ...]:
        """The answer that was kept; empty: none."""
        entry = self._entries.get(key) if key is not None else None
        if key is None or entry is None:
            return ()
        if self._clock() > entry.until:
            self._drop(key)
            return ()
        self._entries.move_to_end(key)
        return entry.answers

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes


def as_chunk(answer: Generation) -> Chunk:
    """A whole answer as its only chunk."""
    return Chunk(**{field.name: getattr(answer, field.name) for field in fields(Chunk)})


def _size(answer: Generation) -> int:
    texts = 4 * (len(answer.text) + len(answer.reasoning) + sum(len(call.arguments) for call in answer.tool_calls))
    rows = len(answer.log_probs) + len(answer.tokens) + sum(map(len, answer.top_log_probs))
    return ENTRY_BYTES + texts + TOKEN_BYTES * rows
