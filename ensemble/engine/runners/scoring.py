"""The interface of a runner that scores rows of tokens in one pass, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.scoring.rows import ScoreRow


@dataclass(frozen=True)
class RowScores:
    """One row: log_probs [num_targets] of its targets; hidden [hidden_size] at the position of its first logits.

    log_probs are empty where they weren't asked for.
    """

    log_probs: NDArray[np.float32]
    hidden: NDArray[np.float32]


class ScoringRunner(Protocol):
    """A model that scores rows; it knows nothing of text, labels or Triton."""

    vocab_size: int
    max_seq_len: int

    def score(self, rows: Sequence[ScoreRow], *, with_log_probs: bool = True) -> list[RowScores]:
        """Each row's scores, in order. The rows must have passed `ScoreRow.check`."""
