"""A runner that takes a fixed time for each step and computes nothing: what is left is the cost of everything else."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from ensemble.engine.runners.base import Decoded, Draw, Ids, Logits, PromptChunk


class PacedRunner:
    """As a GPU does, it chooses tokens itself and lets the caller go on until the step is over."""

    def __init__(self, num_slots: int, max_seq_len: int, vocab_size: int, step_s: float) -> None:
        self.num_slots, self.max_seq_len, self.vocab_size = num_slots, max_seq_len, vocab_size
        self._step_s = step_s
        self._ends_at = 0.0
        self._num_rows = 0

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        """See Runner."""
        time.sleep(self._step_s)
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self._token] = 1
        return logits

    def prefill_many(self, chunks: Sequence[PromptChunk]) -> Logits:
        """See DrawingRunner."""
        return np.stack([self.prefill(chunks[0].slot, chunks[0].ids, chunks[0].start)] * len(chunks))

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        """Not used: every token is drawn."""
        raise NotImplementedError

    def can_draw(self, draw: Draw) -> bool:
        """See DrawingRunner."""
        return True

    def start_decode(self, ids: Ids, positions: Ids, draws: Sequence[Draw | None], logits_rows: Sequence[int]) -> None:
        """See DrawingRunner."""
        self._ends_at = time.perf_counter() + self._step_s
        self._num_rows = len(ids)

    def finish_decode(self) -> Decoded:
        """See DrawingRunner."""
        if (left := self._ends_at - time.perf_counter()) > 0:
            time.sleep(left)
        tokens = np.full(self._num_rows, self._token, np.int64)
        return Decoded(tokens, np.full(self._num_rows, -0.1, np.float32), np.empty((0, self.vocab_size), np.float32))

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """See Runner."""

    def close(self) -> None:
        """See Runner."""

    @property
    def _token(self) -> int:
        return self.vocab_size // 2
