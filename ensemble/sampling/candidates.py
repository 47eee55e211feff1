"""Filtering by top_k, top_p and min_p, in that order (Hugging Face's), and sampling among the remaining tokens.

The result is exact, but the vocabulary isn't sorted: sorting 150,000 tokens takes longer than a small model's step. The
code also avoids temporary arrays of the vocabulary's length: the memory allocator returns them to the system, and the
page faults of the next allocation take longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.sampling.params import SamplingParams

# top_p examines this many of the likeliest tokens first; they nearly always hold its probability mass.
NUCLEUS_CANDIDATES = 1024
# Otherwise it builds a histogram of the scores with this many bins, down to a score whose exp is 0 in float32.
NUM_BINS = 2048
LOWEST_SCORE = -104.0
CHUNK_LEN = 16_384  # scores
BLOCK_LEN = 256  # weights; sample_index sums blocks of this length, then searches one block

Scores = NDArray[np.float32]


def candidates(scores: Scores, params: SamplingParams) -> tuple[NDArray[np.int64] | None, Scores]:
    """Return the ids [n] that the filters keep (None: all, in order) and their unnormalised probabilities [n].

    `scores` [vocab_size] must have the maximum 0; they are overwritten.
    """
    ids: NDArray[np.int64] | None = None
    if params.top_k:
        ids = largest(scores, params.top_k)
        weights = np.exp(scores[ids])
        if params.top_p < 1:
            num_kept = _num_holding(weights, params.top_p * float(weights.sum(dtype=np.float64)))
            ids, weights = ids[:num_kept], weights[:num_kept]
    elif params.top_p < 1:
        ids = _nucleus(scores, params.top_p)
        weights = np.exp(scores[ids])
    else:
        weights = np.exp(scores, out=scores)
    if params.min_p:
        kept = np.flatnonzero(weights >= np.float32(params.min_p))  # the likeliest token's weight is 1
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def sample_index(weights: Scores, uniform: float) -> int:
    """Return the index where the cumulative sum of `weights` [n] exceeds `uniform` (0 … 1) of their total.

    An index whose weight is 0 is never returned.
    """
    starts = np.arange(0, len(weights), BLOCK_LEN)
    blocks = np.cumsum(_block_sums(weights))
    target = _below(uniform * blocks[-1], blocks[-1])
    block = int(np.searchsorted(blocks, target, side="right"))
    within = np.cumsum(weights[starts[block] :][:BLOCK_LEN], dtype=np.float64)
    target = _below(target - (blocks[block - 1] if block else 0.0), within[-1])
    return int(starts[block]) + int(np.searchsorted(within, target, side="right"))


def _block_sums(weights: Scores) -> NDArray[np.float64]:
    """The sums of each BLOCK_LEN weights and of the rest; np.add.reduceat would copy all weights to float64."""
    whole = len(weights) // BLOCK_LEN * BLOCK_LEN
    sums: NDArray[np.float64] = weights[:whole].reshape(-1, BLOCK_LEN).sum(axis=1, dtype=np.float64)
    return sums if whole == len(weights) else np.append(sums, weights[whole:].sum(dtype=np.float64))


def largest(values: Scores, count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest values in descending order; among equals the lower id comes first."""
    ids = np.arange(len(values)) if count >= len(values) else _superset(values, count)
    if count < len(ids):
        some = values[ids]
        smallest = np.partition(some, len(some) - count)[len(some) - count]
        above = np.flatnonzero(some > smallest)
        ids = ids[np.sort(np.concatenate([above, np.flatnonzero(some == smallest)[: count - len(above)]]))]
    return ids[np.argsort(-values[ids], kind="stable")]


def _superset(values: Scores, count: int) -> NDArray[np.int64]:
    """Return ascending ids that include the `count` largest values; usually a small multiple of `count`."""
    num_columns = 4 * count
    num_rows = len(values) // num_columns
    if num_rows < 2:
        return np.arange(len(values))
    # The maxima of `count` columns are at least `bound`, so at least `count` values are.
    maxima = values[: num_rows * num_columns].reshape(num_rows, num_columns).max(axis=0)
    bound = np.partition(maxima, num_columns - count)[num_columns - count]
    return np.flatnonzero(values >= bound)


def _chunks(scores: Scores) -> Iterator[Scores]:
    """Split `scores` into chunks whose temporary arrays fit into the CPU's cache."""
    return (scores[start : start + CHUNK_LEN] for start in range(0, len(scores), CHUNK_LEN))


def _nucleus(scores: Scores, top_p: float) -> NDArray[np.int64]:
    """Return the ids of the fewest likeliest tokens whose probabilities sum to at least top_p."""
    needed = top_p * sum(float(np.exp(chunk).sum(dtype=np.float64)) for chunk in _chunks(scores))
    ids = largest(scores, NUCLEUS_CANDIDATES)
    weights = np.exp(scores[ids])
    if weights.sum(dtype=np.float64) >= needed:
        return ids[: _num_holding(weights, needed)]
    return _wide_nucleus(scores, needed)


def _wide_nucleus(scores: Scores, needed: float) -> NDArray[np.int64]:
    """Return the nucleus if it has many tokens: build a histogram and sort only the bin in which the nucleus ends."""
    lowest = min(max(float(scores.min()), LOWEST_SCORE), -1e-6)
    scale = np.float32((NUM_BINS - 1) / lowest)

    def bins_of(chunk: Scores) -> NDArray[np.int64]:  # bin 0 holds the likeliest tokens
        return np.minimum(chunk * scale, np.float32(NUM_BINS - 1)).astype(np.int64)

    masses = sum(np.bincount(bins_of(chunk), np.exp(chunk), NUM_BINS) for chunk in _chunks(scores))
    mass = np.cumsum(masses)
    edge = min(int(np.searchsorted(mass, needed, side="left")), NUM_BINS - 1)
    bins = np.concatenate([bins_of(chunk).astype(np.int16) for chunk in _chunks(scores)])
    at_edge = np.flatnonzero(bins == edge)
    at_edge = at_edge[np.argsort(-scores[at_edge], kind="stable")]
    still_needed = needed - (float(mass[edge - 1]) if edge else 0.0)
    num_kept = _num_holding(np.exp(scores[at_edge]), still_needed)
    return np.concatenate([np.flatnonzero(bins < edge), at_edge[:num_kept]])


def _num_holding(weights: Scores, needed: float) -> int:
    """Return how many of the first weights sum to at least `needed`; all, if rounding keeps their sum below it."""
    return min(int(np.searchsorted(np.cumsum(weights, dtype=np.float64), needed, side="left")) + 1, len(weights))


def _below(value: float, limit: float) -> float:
    """Return `value`, capped at the largest float below `limit`: rounding may have raised it to `limit`."""
    return min(value, float(np.nextafter(limit, 0)))
