"""The tokens that top_k, top_p and min_p leave, in that order (Hugging Face's), and the draw among them.

Exact, and without sorting the vocabulary: sorting 150,000 tokens takes longer than a small model's step. Nor does it
make more arrays of that length than it must: the memory allocator hands such back to the system, and the page faults
of getting them again take longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.sampling.params import SamplingParams

# The likeliest tokens that top_p looks at first; they nearly always hold the mass.
NUCLEUS_CANDIDATES = 1024
# Where they don't, tokens are counted into so many bins by their score, down to the score whose weight is 0.
NUM_BINS = 2048
LOWEST_SCORE = -104.0
CHUNK_LEN = 16_384
BLOCK_LEN = 256  # a draw adds up blocks of so many weights, then looks into one

Scores = NDArray[np.float32]


def candidates(scores: Scores, params: SamplingParams) -> tuple[NDArray[np.int64] | None, Scores]:
    """Ids (None: all, in order) and their unnormalised probabilities.

    `scores` [vocab_size], whose maximum is 0, are overwritten.
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
        kept = np.flatnonzero(weights >= np.float32(params.min_p))  # the likeliest one's weight is 1
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def draw_index(weights: Scores, uniform: float) -> int:
    """The index at which the weights' running sum passes `uniform` (0 … 1) of the whole; never that of a weight 0."""
    starts = np.arange(0, len(weights), BLOCK_LEN)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = _below(uniform * blocks[-1], blocks[-1])
    block = int(np.searchsorted(blocks, target, side="right"))
    within = np.cumsum(weights[starts[block] :][:BLOCK_LEN], dtype=np.float64)
    target = _below(target - (blocks[block - 1] if block else 0.0), within[-1])
    return int(starts[block]) + int(np.searchsorted(within, target, side="right"))


def largest(values: Scores, count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest values, largest first, the lower id first among equals."""
    ids = np.arange(len(values)) if count >= len(values) else _superset(values, count)
    if count < len(ids):
        some = values[ids]
        smallest = np.partition(some, len(some) - count)[len(some) - count]
        above = np.flatnonzero(some > smallest)
        ids = ids[np.sort(np.concatenate([above, np.flatnonzero(some == smallest)[: count - len(above)]]))]
    return ids[np.argsort(-values[ids], kind="stable")]


def _superset(values: Scores, count: int) -> NDArray[np.int64]:
    """Ids, ascending, among which the `count` largest values are: a few times so many, but for bad luck."""
    num_columns = 4 * count
    num_rows = len(values) // num_columns
    if num_rows < 2:
        return np.arange(len(values))
    # `count` columns have a maximum of at least the bound, so at least `count` values do.
    maxima = values[: num_rows * num_columns].reshape(num_rows, num_columns).max(axis=0)
    bound = np.partition(maxima, num_columns - count)[num_columns - count]
    return np.flatnonzero(values >= bound)


def _chunks(scores: Scores) -> Iterator[Scores]:
    """`scores` in pieces whose intermediate results stay in the processor's cache."""
    return (scores[start : start + CHUNK_LEN] for start in range(0, len(scores), CHUNK_LEN))


def _nucleus(scores: Scores, top_p: float) -> NDArray[np.int64]:
    """Ids of the likeliest tokens that together hold top_p."""
    needed = top_p * sum(float(np.exp(chunk).sum(dtype=np.float64)) for chunk in _chunks(scores))
    ids = largest(scores, NUCLEUS_CANDIDATES)
    weights = np.exp(scores[ids])
    if weights.sum(dtype=np.float64) >= needed:
        return ids[: _num_holding(weights, needed)]
    return _wide_nucleus(scores, needed)


def _wide_nucleus(scores: Scores, needed: float) -> NDArray[np.int64]:
    """`_nucleus` where it is wide: counts tokens into bins and sorts the one bin in which it ends."""
    lowest = min(max(float(scores.min()), LOWEST_SCORE), -1e-6)
    scale = np.float32((NUM_BINS - 1) / lowest)

    def bins_of(chunk: Scores) -> NDArray[np.int64]:  # 0: the likeliest
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
    """How many of the first weights together reach `needed`; all, where rounding keeps them below it."""
    return min(int(np.searchsorted(np.cumsum(weights, dtype=np.float64), needed, side="left")) + 1, len(weights))


def _below(value: float, limit: float) -> float:
    """`value`, or the number next below `limit` where rounding took it there."""
    return min(value, float(np.nextafter(limit, 0)))
