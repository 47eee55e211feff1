"""Random numbers that depend on nothing but a seed and a step.

So a sequence draws the same tokens alone and in a full batch, and again after it was taken out and put back.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np


def sequence_seed(seed: int | None, index: int) -> int:
    """The 64-bit seed of a request's sample `index`: the request's own for the first; None: a random one."""
    if seed is None:
        return secrets.randbits(64)
    if index == 0:
        return seed
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


class CounterRandom:
    """Philox, a cipher of a counter: any number of the stream without those before it."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Philox(key=seed)
        # Setting the state costs a microsecond, a new generator ten.
        self._state: Any = self._generator.state

    def uniform(self, step: int, attempt: int = 0) -> float:
        """A number of 53 random bits, at least 0 and below 1; another for each attempt at the same step."""
        counter = self._state["state"]["counter"]
        counter[0], counter[1] = step, attempt
        self._generator.state = self._state
        return (int(self._generator.random_raw()) >> 11) * 2.0**-53
