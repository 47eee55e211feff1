"""Rounding with compensation: the channels after a rounded input channel absorb its error.

The method is GPTQ (Frantar et al., arXiv 2210.17323) on the E4M3 grid. Inputs: a weight, its scales and the second
moment of the layer's inputs. Output: codes. Nearly all work is in matrix products: a Cholesky factor of each moment,
and lazy updates of everything that comes after a block of channels. The same code runs in NumPy and in torch, whose
sums differ in the last bits: of a thousand codes a few differ by one step, where a number lies between two.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays
from deepseek_triton.builders.fp8.rounding.e4m3 import Float32
from deepseek_triton.builders.graph.float8 import E4M3

MAX_BLOCK = 4096  # input channels whose errors compensate each other; it bounds memory and time of large layers
LAZY_BLOCK, INNER_BLOCK = 128, 16  # channels rounded before the rest of the block, and of the lazy block, is updated
UPDATED = 1024  # channels that a lazy update changes at a time
DAMPING = 0.01  # of the mean of the moment's diagonal, added to it
INVERTED = 256  # rows of a triangular block that is inverted directly


class SecondMoment:
    """Running X^T X of a layer's input, in diagonal blocks of `MAX_BLOCK` channels, float64."""

    def __init__(self, channels: int, arrays: Arrays | None = None) -> None:
        self.arrays = arrays or Arrays()
        edges = [*range(0, channels, MAX_BLOCK), channels]
        self.blocks = [slice(a, b) for a, b in pairwise(edges)]
        self.moments = [self.arrays.zeros(b.stop - b.start, b.stop - b.start) for b in self.blocks]
        self.num_rows = 0

    def add(self, rows: Array) -> None:
        """rows [n, channels] float32, of the same `arrays`."""
        for block, moment in zip(self.blocks, self.moments, strict=True):
            part = rows[:, block]
            moment += part.T @ part
        self.num_rows += len(rows)

    def diagonal(self) -> NDArray[np.float64]:
        """Mean square of each channel: [channels]."""
        diagonals = [self.arrays.get(self.arrays.xp.diagonal(moment)) for moment in self.moments]
        mean: NDArray[np.float64] = np.concatenate(diagonals) / max(1, self.num_rows)
        return mean


def compensated_codes(weight: NDArray[Any], scale: Float32, moment: SecondMoment) -> NDArray[Any]:
    """E4M3 codes [out, in] of `weight` [out, in] under `scale` [out]; rows of several layers may be stacked."""
    codes = np.empty(weight.shape, np.uint8)
    for block, h in zip(moment.blocks, moment.moments, strict=True):
        codes[:, block] = _block_codes(weight[:, block], scale, h, moment.arrays)
    return codes.view(E4M3)


def _block_codes(weight: NDArray[Any], scale: Float32, moment: Array, arrays: Arrays) -> NDArray[np.uint8]:
    # Largest channels first: their errors are the largest, and many channels are left to absorb them.
    order = np.argsort(-arrays.get(arrays.xp.diagonal(moment)), kind="stable")
    here = arrays.index(order)
    # In units of each row's scale, transposed: [in, out], so that a channel is contiguous.
    remaining = (arrays.put(weight).T[here] / arrays.put(scale)) * 1
    factor = _inverse_factor(moment[here][:, here], arrays)
    for start in range(0, len(order), LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, len(order))
        errors = round_block(remaining[start:stop], factor[start:stop, start:stop], arrays)
        for first in range(stop, len(order), UPDATED):
            rest = slice(first, first + UPDATED)
            remaining[rest] -= factor[start:stop, rest].T @ errors
    return arrays.codes(remaining[arrays.index(np.argsort(order))].T)


def round_block(remaining: Array, factor: Array, arrays: Arrays) -> Array:
    """Round `remaining` [channels, out] in place; the errors [channels, out] that later channels absorb.

    factor: [channels, channels], upper triangular.
    """
    errors = arrays.xp.empty_like(remaining)
    diagonal = arrays.get(arrays.xp.diagonal(factor))
    for start in range(0, len(remaining), INNER_BLOCK):
        stop = min(start + INNER_BLOCK, len(remaining))
        for i in range(start, stop):
            rounded = arrays.rounded(remaining[i])
            errors[i] = (remaining[i] - rounded) / float(diagonal[i])
            remaining[i] = rounded
            if i + 1 < stop:
                remaining[i + 1 : stop] -= factor[i, i + 1 : stop, None] * errors[i]
        remaining[stop:] -= factor[start:stop, stop:].T @ errors[start:stop]
    return errors


def _inverse_factor(moment: Array, arrays: Arrays) -> Array:
    """The upper triangular U with U^T U = (H + damping)^-1, float32: row i says how channel i's error spreads."""
    diagonal = arrays.xp.diagonal(moment)
    damping = max(DAMPING * float(diagonal.mean()), 1e-12)
    size = len(moment)
    damped = moment * 1
    damped[arrays.index(np.arange(size)), arrays.index(np.arange(size))] += damping
    # H = R R^T with R upper triangular is the Cholesky decomposition of H with rows and columns reversed; U is R^-1.
    back = arrays.index(np.arange(size)[::-1])
    upper = arrays.xp.linalg.cholesky(damped[back][:, back])[back][:, back]
    return arrays.single(_inverted(upper, arrays))


def _inverted(upper: Array, arrays: Arrays) -> Array:
    """The inverse of an upper triangular matrix, by halves: matrix products do the work."""
    size = len(upper)
    if size <= INVERTED:
        return arrays.xp.linalg.inv(upper)
    half = size // 2
    left, right = _inverted(upper[:half, :half], arrays), _inverted(upper[half:, half:], arrays)
    inverse = arrays.xp.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = left, right
    inverse[:half, half:] = -(left @ upper[:half, half:]) @ right
    return inverse
