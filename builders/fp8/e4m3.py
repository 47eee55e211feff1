"""E4M3 arithmetic: scales in, codes out. NumPy alone; it knows nothing about layers or graphs.

E4M3 (finite, no infinity): 4 exponent and 3 mantissa bits, ±448, smallest normal 2^-6, step 2^-9 below it.
Source: Micikevicius et al., «FP8 Formats for Deep Learning» (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.graph.float8 import E4M3, E4M3_MAX

Float32 = NDArray[np.float32]
# Below this a float16 scale keeps too few bits; such weights or activations are all but zero anyway.
MIN_SCALE = 2.0**-20
# A floating-point grid looks the same one octave up: scales from half a step of clipping to three octaves of headroom.
SCALE_CANDIDATES = tuple(2.0 ** (k / 8) for k in range(-2, 9))


def encode(values: NDArray[Any], scale: NDArray[Any] | float) -> NDArray[Any]:
    """The E4M3 codes nearest to values / scale, ties to even, saturating: what QuantizeLinear computes."""
    divided = np.asarray(values, np.float32) / np.asarray(scale, np.float32)
    np.clip(divided, -E4M3_MAX, E4M3_MAX, out=divided)
    return divided.astype(E4M3)


def round_trip(values: NDArray[Any], scale: NDArray[Any] | float) -> Float32:
    """Each value as its code gives it back: float32, the shape of `values`."""
    decoded: Float32 = encode(values, scale).astype(np.float32)
    decoded *= np.asarray(scale, np.float32)
    return decoded


def storable(scale: NDArray[Any] | float, dtype: np.dtype[Any]) -> Float32:
    """The scale that the network's dtype can hold; codes must be computed with this one."""
    return np.maximum(np.asarray(scale, np.float32), np.float32(MIN_SCALE)).astype(dtype).astype(np.float32)


def max_scale(amax: NDArray[Any] | float, dtype: np.dtype[Any]) -> Float32:
    """The scale that maps the largest magnitude to 448."""
    return storable(np.asarray(amax, np.float32) / np.float32(E4M3_MAX), dtype)


def least_error_scale(
    rows: NDArray[Any],
    importance: NDArray[Any],
    dtype: np.dtype[Any],
    candidates: Iterable[float] = SCALE_CANDIDATES,
) -> Float32:
    """For each row the scale of least Σ importance · (value − rounded)².

    Args:
        rows: [n, columns].
        importance: [columns], how much a squared error in each column weighs.
        dtype: the dtype that must hold the scale.
        candidates: factors of the scale that maps the row's largest magnitude to 448.

    Returns:
        [n] float32; among equals, the first candidate.
    """
    base = np.abs(rows).max(axis=1)
    best = max_scale(base, dtype)
    least = _row_errors(rows, best, importance)
    for factor in candidates:
        scale = max_scale(base * np.float32(factor), dtype)
        errors = _row_errors(rows, scale, importance)
        better = errors < least
        best, least = np.where(better, scale, best), np.where(better, errors, least)
    return best


def _row_errors(rows: NDArray[Any], scale: Float32, importance: NDArray[Any]) -> NDArray[np.float64]:
    difference = round_trip(rows, scale[:, None]) - rows
    np.square(difference, out=difference)
    errors: NDArray[np.float64] = (difference @ np.asarray(importance, np.float32)).astype(np.float64)
    return errors
