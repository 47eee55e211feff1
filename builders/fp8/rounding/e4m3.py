"""E4M3 arithmetic in NumPy: values and scales in, codes out. It knows nothing about layers or graphs.

E4M3 (finite, no infinity): 4 exponent and 3 mantissa bits, ±448, smallest normal 2^-6, step 2^-9 below it.
Source: Micikevicius et al., «FP8 Formats for Deep Learning» (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays
from deepseek_triton.builders.fp8.rounding.host import encode_rows
from deepseek_triton.builders.graph.float8 import E4M3, E4M3_MAX

Float32 = NDArray[np.float32]
# A float16 scale below this has too few bits. Weights or activations that need a smaller one are close to zero.
MIN_SCALE = 2.0**-20
# Factors of the scale that maps the largest magnitude to 448: 2^(-1/4) clips it a little, 2 leaves an octave unused.
# More isn't tried: a floating-point grid looks the same one octave up.
SCALE_CANDIDATES = tuple(2.0 ** (k / 8) for k in range(-2, 9))
OCTAVE = SCALE_CANDIDATES[2:10]  # those that clip nothing and leave less than an octave unused


def encode(values: NDArray[Any], scale: NDArray[Any] | float) -> NDArray[Any]:
    """The E4M3 codes nearest to values / scale, ties to even, saturating, as QuantizeLinear computes them."""
    factor = np.asarray(scale, np.float32)
    if values.ndim == 2 and factor.shape in ((), (1, 1), (len(values), 1)):
        return encode_rows(values, np.broadcast_to(factor.reshape(-1), len(values)))
    divided = np.asarray(values, np.float32) / factor
    np.clip(divided, -E4M3_MAX, E4M3_MAX, out=divided)
    return divided.astype(E4M3)


def round_trip(values: NDArray[Any], scale: NDArray[Any] | float) -> Float32:
    """Encode and decode the values: float32, the shape of `values`."""
    decoded: Float32 = encode(values, scale).astype(np.float32)
    decoded *= np.asarray(scale, np.float32)
    return decoded


def storable(scale: NDArray[Any] | float, dtype: np.dtype[Any]) -> Float32:
    """The scale rounded to the network's dtype; codes must be computed with the rounded one."""
    return np.maximum(np.asarray(scale, np.float32), np.float32(MIN_SCALE)).astype(dtype).astype(np.float32)


def max_scale(amax: NDArray[Any] | float, dtype: np.dtype[Any]) -> Float32:
    """The scale that maps the largest magnitude to 448."""
    return storable(np.asarray(amax, np.float32) / np.float32(E4M3_MAX), dtype)


def least_weight_error_scale(
    weight: Array, dtype: np.dtype[Any], *, is_per_tensor: bool = False, arrays: Arrays | None = None
) -> Float32:
    """For each row, or for the tensor, the scale with the least Σ (value − rounded)² that clips nothing.

    Args:
        weight: [n, columns], placed in `arrays`.
        dtype: the scale's dtype in the artefact.

    Returns:
        [n] or [] float32; among equal ones, the smallest.
    """
    arrays = arrays or Arrays()
    amax = arrays.row_amax(weight)
    if is_per_tensor:
        amax = np.full_like(amax, amax.max())
    errors = arrays.row_errors(weight, amax, OCTAVE)
    if is_per_tensor:
        return max_scale(amax[0] * np.float32(OCTAVE[int(errors.sum(axis=1).argmin())]), dtype)
    return max_scale(amax * np.asarray(OCTAVE, np.float32)[errors.argmin(axis=0)], dtype)


def least_error_scale(
    rows: NDArray[Any],
    importance: NDArray[Any],
    dtype: np.dtype[Any],
    candidates: Sequence[float] = SCALE_CANDIDATES,
    arrays: Arrays | None = None,
) -> Float32:
    """For each row, the scale with the least Σ importance · (value − rounded)².

    Args:
        rows: [n, columns].
        importance: [columns], the weight of a squared error in each column.
        dtype: the scale's dtype in the artefact.
        candidates: factors of the scale that maps the row's largest magnitude to 448.
        arrays: where the errors are computed.

    Returns:
        [n] float32; of equally good scales, the one that maps the largest magnitude to 448, or the first candidate.
    """
    arrays = arrays or Arrays()
    placed = arrays.place(rows)
    amax, factors = arrays.row_amax(placed), (1.0, *candidates)
    errors = arrays.row_errors(placed, amax, factors, importance)
    return max_scale(amax * np.asarray(factors, np.float32)[errors.argmin(axis=0)], dtype)
