"""Rounding with compensation: each input channel's error is made up for by the channels after it.

The method is GPTQ (Frantar et al., arXiv 2210.17323) on the E4M3 grid. What enters is a weight, its scales and the
second moment of the layer's inputs; what leaves is codes. Large layers are treated in diagonal blocks of the moment, so
that memory and time stay bounded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.e4m3 import Float32, encode
from deepseek_triton.builders.graph.float8 import E4M3

MAX_BLOCK = 4096  # input channels whose errors compensate each other
LAZY_BLOCK = 64  # channels rounded before the rest of the block is updated
DAMPING = 0.01  # of the mean of the moment's diagonal, added to it


class SecondMoment:
    """Running X^T X of a layer's input, in diagonal blocks of `MAX_BLOCK` channels."""

    def __init__(self, channels: int) -> None:
        edges = [*range(0, channels, MAX_BLOCK), channels]
        self.blocks = [slice(a, b) for a, b in pairwise(edges)]
        self.moments = [np.zeros((b.stop - b.start, b.stop - b.start), np.float64) for b in self.blocks]
        self.num_rows = 0

    def add(self, rows: Float32) -> None:
        """rows [n, channels]"""
        for block, moment in zip(self.blocks, self.moments, strict=True):
            part = rows[:, block]
            moment += part.T @ part
        self.num_rows += len(rows)

    def diagonal(self) -> NDArray[np.float64]:
        """Mean square of each channel: [channels]."""
        return np.concatenate([np.diagonal(moment) for moment in self.moments]) / max(1, self.num_rows)


def compensated_codes(weight: Float32, scale: Float32, moment: SecondMoment) -> NDArray[Any]:
    """E4M3 codes [out, in] of `weight` [out, in] under `scale` [out]: rows of several layers may be stacked."""
    codes = np.empty(weight.shape, E4M3)
    for block, h in zip(moment.blocks, moment.moments, strict=True):
        codes[:, block] = _block_codes(weight[:, block], scale, h)
    return codes


def _block_codes(weight: Float32, scale: Float32, moment: NDArray[np.float64]) -> NDArray[Any]:
    # Large channels first: their errors are the dearest, and many channels are left to make up for them.
    order = np.argsort(-np.diagonal(moment), kind="stable")
    remaining = np.ascontiguousarray(weight[:, order].T, dtype=np.float32)  # [in, out]: a channel is contiguous
    factor = _inverse_factor(moment[np.ix_(order, order)])
    codes = np.empty(remaining.shape, E4M3)
    for start in range(0, len(factor), LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, len(factor))
        errors = np.empty((stop - start, remaining.shape[1]), np.float32)
        for i in range(start, stop):
            codes[i] = encode(remaining[i], scale)
            error = (remaining[i] - codes[i].astype(np.float32) * scale) / factor[i, i]
            remaining[i + 1 : stop] -= factor[i, i + 1 : stop, None] * error
            errors[i - start] = error
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
    result = np.empty(weight.shape, E4M3)
    result[:, order] = codes.T
    return result


def _inverse_factor(moment: NDArray[np.float64]) -> Float32:
    """The upper triangular U with U^T U = (H + damping)^-1: row i says how channel i's error spreads."""
    diagonal = np.diagonal(moment)
    damping = max(DAMPING * float(diagonal.mean()), 1e-12)
    inverse = np.linalg.inv(moment + np.eye(len(moment)) * damping)
    factor: Float32 = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
    return factor
