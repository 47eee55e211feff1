"""A runner's first steps are slow: libraries choose kernels, and weights are read. They are taken at load instead.

What they write into the caches is overwritten by the slots' first sequences.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from deepseek_triton.ensemble.engine.runners.base import Runner

NUM_TOKENS = 8  # of a prompt that reads every weight, and takes little time on the largest model


def warm_up(runner: Runner, max_num_batched_tokens: int, batch_sizes: Iterable[int] = (1,)) -> None:
    """Compute a short prompt, and a token of each number of sequences in `batch_sizes`.

    Raises:
        RunnerError: the runner can't compute.
    """
    num_tokens = min(NUM_TOKENS, max_num_batched_tokens, runner.max_seq_len - 1)
    runner.prefill(0, np.zeros(num_tokens, np.int64), 0)
    for size in batch_sizes:
        runner.decode(np.zeros(size, np.int64), np.full(size, num_tokens, np.int64))
