"""E4M3 rounding with NumPy's float32 and integer arithmetic, on all cores.

ml_dtypes' own casts hold the GIL and take 10 ns a number. Here a number is rounded by adding and subtracting a constant
whose unit in the last place is the grid's step: exact, ties to even.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.rounding.row_blocks import for_row_blocks
from deepseek_triton.builders.graph.float8 import E4M3, E4M3_MAX

Float32 = NDArray[np.float32]
BF16 = np.dtype(ml_dtypes.bfloat16)
MAGNITUDE, EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)  # bits of a float32
# Added to 2^e it gives 1.5 · 2^(e + 20), whose unit in the last place is 2^(e - 3): E4M3's step from 2^e on.
TO_ROUNDING_CONSTANT = np.uint32((20 << 23) | 0x400000)
SMALLEST_NORMAL, SUBNORMAL_STEP = np.float32(2.0**-6), np.float32(2.0**-9)
LEADING_BITS = np.float32(2.0**20 + 1)  # the factor of Dekker's split that leaves 4 of a float32's 24 bits
NEAREST_OVER_MAX = E4M3_MAX * 1.03  # below it rounding itself gives the largest number
# A float32's sign, exponent and first three fraction bits, less this, are E4M3's but for the sign's place.
EXPONENT_DIFFERENCE = np.uint16((127 - 7) << 3)

_scratch = threading.local()


def row_amax(values: NDArray[Any]) -> Float32:
    """The largest magnitude of each row of `values` [n, k]: [n]; NaN where the row has one."""
    amax = np.empty(len(values), np.float32)

    def work(rows: slice) -> None:
        x = _float32(values[rows])
        amax[rows] = np.abs(x, out=_buffer("divided", x.shape)).max(axis=1, initial=0)

    for_row_blocks(values.shape, work)
    return amax


def encode_rows(values: NDArray[Any], scale: Float32) -> NDArray[Any]:
    """The E4M3 codes nearest to values [n, k] / scale [n], ties to even, saturating."""
    codes = np.empty(values.shape, np.uint8)

    def work(rows: slice) -> None:
        x = _float32(values[rows])
        y, rounded, constant = (_buffer(name, x.shape) for name in ("divided", "rounded", "constant"))
        np.divide(x, scale[rows, None], out=y)
        magnitude = np.abs(y, out=rounded)
        if magnitude.max(initial=0) > NEAREST_OVER_MAX:
            np.clip(y, -E4M3_MAX, E4M3_MAX, out=y)
        small = np.flatnonzero(magnitude < SMALLEST_NORMAL)
        bits = constant.view(np.uint32)
        np.bitwise_and(y.view(np.uint32), EXPONENT, out=bits)
        bits += TO_ROUNDING_CONSTANT
        np.add(y, constant, out=rounded)
        rounded -= constant
        np.right_shift(rounded.view(np.uint32), 20, out=bits)
        fields = _buffer("fields", x.shape).view(np.uint16).reshape(-1)[: x.size].reshape(x.shape)
        np.copyto(fields, bits, casting="unsafe")
        signs = codes[rows]
        np.right_shift(fields, 4, out=signs, casting="unsafe")
        signs &= 0x80
        fields -= EXPONENT_DIFFERENCE
        fields &= 0x7F
        np.bitwise_or(signs, fields, out=codes[rows], casting="unsafe")
        if len(small):
            few = y.reshape(-1)[small]
            steps = np.rint(np.abs(few) / SUBNORMAL_STEP).astype(np.uint8)  # 8 steps are the smallest normal number
            codes[rows].reshape(-1)[small] = steps | (np.signbit(few).astype(np.uint8) << 7)

    for_row_blocks(values.shape, work)
    return codes.view(E4M3)


def nearest(values: Float32) -> Float32:
    """The nearest number of the grid to each of `values`, ties to even, saturating: a new array."""
    limit = np.float32(E4M3_MAX)
    constant = np.empty(values.shape, np.float32)
    bits = constant.view(np.uint32)
    np.bitwise_and(values.view(np.uint32), EXPONENT, out=bits)
    np.maximum(bits, SMALLEST_NORMAL.view(np.uint32), out=bits)
    bits += TO_ROUNDING_CONSTANT
    found: Float32 = values + constant
    found -= constant
    return np.clip(found, -limit, limit, out=found)


def row_errors(
    values: NDArray[Any], amax: Float32, factors: Sequence[float], importance: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """Σ importance · (value - rounded)² of every row: [factors, n].

    It leaves out that E4M3 has fewer bits below 2^-6 of a scale, 1 / 28,672 of the row's largest magnitude.

    Args:
        values: [n, k].
        amax: [n], the largest magnitude of each row.
        factors: of the scales that map the largest magnitude to 448.
        importance: [k]; None: 1 everywhere.
    """
    errors = np.empty((len(factors), len(values)), np.float64)
    unit = np.maximum(amax, np.finfo(np.float32).tiny) / np.float32(E4M3_MAX)
    roots = None if importance is None else np.sqrt(np.asarray(importance, np.float32))

    def work(rows: slice) -> None:
        x = _float32(values[rows])
        full, y, split = (_buffer(name, x.shape) for name in ("rounded", "divided", "constant"))
        np.divide(x, unit[rows, None], out=full)
        for factor, error in zip(factors, errors, strict=True):
            np.multiply(full, np.float32(1 / factor), out=y)
            difference = _buffer("difference", x.shape)
            clipped = np.clip(y, -E4M3_MAX, E4M3_MAX, out=_buffer("clipped", x.shape)) if factor < 1 else y
            np.multiply(clipped, LEADING_BITS, out=split)
            np.subtract(split, clipped, out=difference)
            split -= difference  # the four leading bits
            split -= y
            if roots is not None:
                split *= roots
            error[rows] = np.einsum("ij,ij->i", split, split) * np.square(factor * unit[rows], dtype=np.float64)

    for_row_blocks(values.shape, work)
    return errors


def _float32(block: NDArray[Any]) -> Float32:
    """The block as float32: itself, or a copy in this thread's memory."""
    if block.dtype == np.float32:
        return block
    copy = _buffer("values", block.shape)
    if block.dtype == BF16:
        np.left_shift(block.view(np.uint16), 16, out=copy.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(copy, block, casting="unsafe")
    return copy


def _buffer(name: str, shape: tuple[int, ...]) -> Float32:
    """Uninitialised memory of this thread's, the same for one name at every call."""
    size = int(np.prod(shape))
    memory = getattr(_scratch, name, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.float32)
        setattr(_scratch, name, memory)
    found: Float32 = memory[:size].reshape(shape)
    return found
