"""Repetition, presence and frequency penalties of one sequence.

The counts are updated incrementally, and each step changes only the logits of tokens that were seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.sampling.params import MAX_FLOAT32, SamplingParams


class Penalties:
    """Counts the tokens of one sequence and applies the penalties to its logits.

    The repetition penalty covers prompt and output, as in Hugging Face, vLLM and TensorRT-LLM. The presence and
    frequency penalties cover the output only, as in OpenAI and vLLM (TensorRT-LLM includes the prompt).
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._params = params
        seen = (
            np.unique(np.fromiter(prompt_ids, np.int64)) if params.repetition_penalty != 1.0 else np.empty(0, np.int64)
        )
        self._num_seen = len(seen)
        self._ids = seen  # [capacity]; the first _num_seen are valid
        self._counts = np.zeros(len(seen), np.int64)  # [capacity], how often each id was generated
        self._index = {token: index for index, token in enumerate(seen.tolist())}

    def push(self, token: int) -> None:
        """Count a generated token."""
        index = self._index.setdefault(token, self._num_seen)
        if index == self._num_seen:
            if index == len(self._ids):
                more = max(64, index)
                self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(more, np.int64)])
            self._ids[index] = token
            self._num_seen += 1
        self._counts[index] += 1

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Apply the penalties to `logits` [vocab_size] in place. Overflow is clipped to float32's range; -inf stays."""
        ids, counts = self._ids[: self._num_seen], self._counts[: self._num_seen]
        params = self._params
        before = logits[ids]
        values = before.astype(np.float64)
        if params.repetition_penalty != 1.0:
            with np.errstate(over="ignore"):
                values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits[ids] = np.where(before == -np.inf, -np.inf, values.clip(-MAX_FLOAT32, MAX_FLOAT32))
