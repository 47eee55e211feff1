"""SmoothQuant: move part of the spread between a layer's input channels into its weights.

Each input channel is divided by a factor, and the weight's column is multiplied by it. The division is folded into the
channel's producer (a norm's weight, or rows of the projection before), so the graph doesn't change, and before rounding
it computes the same. Source: Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.rounding.e4m3 import Float32
from deepseek_triton.ensemble.decoder.part import Part, SharedChannels

MAX_FACTOR = 2.0**10  # and its inverse: larger factors would cost precision in float16


def smoothing_factors(channel_amax: NDArray[Any], weights: list[Float32], exponent: float) -> Float32:
    """The divisor of each input channel: amax(x)^a / amax(w)^(1 - a), [in] float32.

    Args:
        channel_amax: [in], the input's largest magnitudes.
        weights: the layers that read this input, [out, in] each.
        exponent: a, 0 to 1.
    """
    weight_amax = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    # A channel whose input or weights are all zero keeps the factor 1 (before the mean is taken out).
    used = (channel_amax > 0) & (weight_amax > 0)
    x, w = np.where(used, channel_amax, 1.0), np.where(used, weight_amax, 1.0)
    factors = np.power(x, exponent) / np.power(w, 1 - exponent)
    factors /= np.exp(np.mean(np.log(factors)))  # the geometric mean is 1: the tensor's magnitude is kept
    clipped: Float32 = np.clip(factors, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)
    return clipped


def smooth_layer(
    weights: dict[str, Float32], amax: dict[str, NDArray[Any]], parts: Sequence[Part], exponent: float
) -> dict[str, Float32]:
    """Smooth every tap of one layer; the weights are changed in place.

    Args:
        weights: name without the layer's prefix → array; linear layers [out, in].
        amax: tap → [in] largest magnitudes of the channels.
        parts: the layer's parts, which declare its taps.

    Returns:
        tap → the divisors of its channels, [in].
    """
    divided = {}
    for part, tap in ((owner, tap) for owner in parts for tap in owner.taps):
        if tap.producer is None:
            divided[tap.value] = np.ones_like(amax[tap.value])
            continue
        readers = [weights[f"{module}.weight"] for module in tap.modules]
        shared = part.shared_channels(tap.value)
        if shared is None:
            factors = of_producer = smoothing_factors(amax[tap.value], readers, exponent)
        else:
            of_producer, factors = _shared_factors(amax[tap.value], readers, shared, exponent)
        _divide(weights, tap.producer, of_producer)
        for weight in readers:
            weight *= factors
        divided[tap.value] = factors
    return divided


def _shared_factors(
    amax: NDArray[Any], readers: list[Float32], shared: SharedChannels, exponent: float
) -> tuple[Float32, Float32]:
    """Factors of the producer's channels [num_groups * width], and those repeated for each input channel [in]."""
    shape = (shared.num_groups, shared.num_repeats, shared.width)
    largest = amax.reshape(shape).max(axis=1).reshape(-1)
    columns = [np.abs(weight).max(axis=0).reshape(shape).max(axis=1).reshape(1, -1) for weight in readers]
    factors = smoothing_factors(largest, columns, exponent)
    repeated = np.repeat(factors.reshape(shared.num_groups, 1, shared.width), shared.num_repeats, axis=1)
    return factors, repeated.reshape(-1)


def _divide(weights: dict[str, Float32], producer: str, factors: Float32) -> None:
    for kind in ("weight", "bias"):
        name = f"{producer}.{kind}"
        if name in weights:
            weight = weights[name]
            weight /= factors[:, None] if weight.ndim == 2 else factors
