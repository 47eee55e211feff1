"""Random numbers that are a function of a seed and a step only.

So a sequence has the same tokens alone and in a full batch, and after it was preempted and resumed.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np


def sequence_seed(seed: int | None, index: int) -> int:
    """Return the 64-bit seed of a request's sequence `index`.

    Sequence 0 uses the request's seed, others a seed derived from it. Without a request's seed it is random.
    """
    if seed is None:
        return secrets.randbits(64)
    if index == 0:
        return seed
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


class CounterRandom:
    """A counter-based generator (Philox): each number is computed directly from its counter."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Philox(key=seed)
        # Setting the state takes 1 µs, creating a generator 10 µs.
        self._state: Any = self._generator.state

    def uniform(self, step: int, attempt: int = 0) -> float:
        """Return a number in [0, 1) with 53 random bits; each attempt at the same step has its own."""
        counter = self._state["state"]["counter"]
        counter[0], counter[1] = step, attempt
        self._generator.state = self._state
        return (int(self._generator.random_raw()) >> 11) * 2.0**-53
