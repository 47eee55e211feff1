"""A runner that takes a known time for each call and computes nothing, to measure the overhead of everything else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from deepseek_triton.ensemble.engine.runners.base import Decoded, DeviceSampling, Ids, Logits, PromptChunk


class PacedRunner:
    """Works like a GPU: it samples tokens itself, and processes queued calls in order while the caller goes on.

    Args:
        step_s: seconds that a decode takes.
        prompt_token_s: seconds for each token of a prefill; None: a prefill takes as long as a decode.
        steps_in_flight: as in PipelinedRunner.
    """

    packs_prompts = True

    def __init__(
        self,
        max_num_seqs: int,
        max_seq_len: int,
        vocab_size: int,
        step_s: float,
        prompt_token_s: float | None = None,
        steps_in_flight: int = 2,
    ) -> None:
        self.max_num_seqs, self.max_seq_len, self.vocab_size = max_num_seqs, max_seq_len, vocab_size
        self.steps_in_flight = steps_in_flight
        self._step_s, self._prompt_token_s = step_s, prompt_token_s
        self._free_at = 0.0
        self._decodes: deque[tuple[float, int]] = deque()  # when it ends, rows
        self._prefills: deque[tuple[float, int]] = deque()

    def prefill(self, slot: int, ids: Ids, start: int) -> Logits:
        """Not used, because every token is sampled on the device."""
        raise NotImplementedError

    def decode(self, ids: Ids, positions: Ids) -> Logits:
        """Not used."""
        raise NotImplementedError

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """See PipelinedRunner."""
        return True

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See PipelinedRunner."""
        self._decodes.append((self._end(self._step_s), len(ids)))

    def finish_decode(self) -> Decoded:
        """See PipelinedRunner."""
        return self._wait(*self._decodes.popleft())

    def start_prefill(
        self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See PipelinedRunner."""
        num_tokens = sum(len(chunk.ids) for chunk in chunks)
        seconds = self._step_s if self._prompt_token_s is None else num_tokens * self._prompt_token_s
        self._prefills.append((self._end(seconds), len(chunks)))

    def finish_prefill(self) -> Decoded:
        """See PipelinedRunner."""
        return self._wait(*self._prefills.popleft())

    def abandon(self) -> None:
        """See PipelinedRunner."""
        self._decodes.clear()
        self._prefills.clear()

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """See Runner."""

    def close(self) -> None:
        """See Runner."""

    def _end(self, seconds: float) -> float:
        """The time at which a call that starts now ends."""
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        return self._free_at

    def _wait(self, ends_at: float, num_rows: int) -> Decoded:
        if (left := ends_at - time.perf_counter()) > 0:
            time.sleep(left)
        tokens = np.full(num_rows, self.vocab_size // 2, np.int64)
        return Decoded(tokens, np.full(num_rows, -0.1, np.float32), np.empty((0, self.vocab_size), np.float32))
