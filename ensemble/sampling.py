"""How the next token is chosen: SamplingParams, validated once, and the sampler.

It sees one row of logits at a time; it knows nothing of batches, slots or text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The likeliest tokens that top_p looks at first; they nearly always hold the mass, and sorting a whole
# vocabulary of 150,000 takes longer than a small model's step.
NUCLEUS_CANDIDATES = 1024
MIN_TEMPERATURE = 1e-5  # below it float32 would overflow, and only the likeliest token is left anyway


class SamplingError(ValueError):
    """A sampling parameter is out of range, or the logits can't be sampled; the message is one line."""

    @classmethod
    def not_finite(cls) -> SamplingError:
        """The error for logits that hold NaN or infinity."""
        return cls("the model's logits are not finite; the checkpoint or its precision is at fault")


@dataclass(frozen=True)
class SamplingParams:
    """One request's choices.

    max_tokens: at most so many new tokens; None: up to the context's end.
    temperature: 0 takes the likeliest token; None: 1 if top_k or top_p is given, else 0.
    top_k: sample among the k likeliest; 0: all.
    top_p: sample among the likeliest that together hold this probability; 1: all.
    seed: the same seed gives the same tokens; None: a random one.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SamplingError(f"max_tokens is {self.max_tokens}, must be at least 1")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingError(f"temperature is {self.temperature}, must be a finite number of at least 0")
        if self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k}, must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}, must be above 0 and at most 1")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        if self.temperature is None:
            return not self.top_k and self.top_p == 1.0
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1


class Sampler:
    """Chooses one sequence's tokens; holds its random state."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = None if params.is_greedy else np.random.Generator(np.random.Philox(params.seed))

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token id from `logits` [vocab_size].

        Raises:
            SamplingError: the logits hold NaN or infinity.
        """
        best = int(logits.argmax())  # the first NaN, where there is one
        if not np.isfinite(logits[best]):
            raise SamplingError.not_finite()
        if self._random is None:
            return best
        temperature = 1.0 if self._params.temperature is None else self._params.temperature
        ids, weights = self._candidates((logits - logits[best]) / np.float32(temperature))
        cumulative = np.cumsum(weights, dtype=np.float64)
        chosen = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(chosen, len(ids) - 1)])

    def _candidates(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ids left by top_k and top_p, and their unnormalised probabilities; scores are at most 0."""
        top_k, top_p = self._params.top_k, self._params.top_p
        weights = np.exp(scores)
        if top_p < 1:
            total = weights.sum(dtype=np.float64)
            limit = top_k or NUCLEUS_CANDIDATES
            ids = _largest(weights, limit)
            if top_k:
                total = weights[ids].sum(dtype=np.float64)
            elif weights[ids].sum(dtype=np.float64) < top_p * total:
                ids = _largest(weights, len(weights))
            cumulative = np.cumsum(weights[ids], dtype=np.float64)
            ids = ids[: int(np.searchsorted(cumulative, top_p * total, side="left")) + 1]
            return ids, weights[ids]
        if top_k:
            ids = _largest(weights, top_k)
            return ids, weights[ids]
        return np.arange(len(weights)), weights


def _largest(weights: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest weights, largest first, the lower id first among equals."""
    if count < len(weights):
        smallest = np.partition(weights, len(weights) - count)[len(weights) - count]
        above = np.flatnonzero(weights > smallest)
        ids = np.sort(np.concatenate([above, np.flatnonzero(weights == smallest)[: count - len(above)]]))
    else:
        ids = np.arange(len(weights))
    return ids[np.argsort(-weights[ids], kind="stable")]
