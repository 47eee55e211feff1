"""SmoothQuant: part of the spread between a layer's input channels moves into its weights.

Each input channel is divided by a factor and the weight's column multiplied by it; the division is folded into what
produces the channel (a norm's weight, or rows of the projection before), so the graph stays as it was and, unrounded,
computes the same. Source: Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.spec import ModelSpec
from deepseek_triton.builders.fp8.e4m3 import Float32
from deepseek_triton.builders.fp8.layer_session import TAPS

MAX_FACTOR = 2.0**10  # either way; beyond it float16 would suffer

# tap → the module whose output channels are divided
PRODUCERS = {
    "input_layernorm": "input_layernorm",
    "self_attn.attention_flat": "self_attn.v_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.product": "mlp.up_proj",
}


def smoothing_factors(channel_amax: NDArray[Any], weights: list[Float32], exponent: float) -> Float32:
    """What each input channel is divided by: amax(x)^a / amax(w)^(1 - a), [in] float32.

    Args:
        channel_amax: [in], the input's largest magnitudes.
        weights: the layers that read this input, [out, in] each.
        exponent: a, 0 to 1.
    """
    weight_amax = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    # A channel that is never used, on either side, has nothing to give or take.
    used = (channel_amax > 0) & (weight_amax > 0)
    x, w = np.where(used, channel_amax, 1.0), np.where(used, weight_amax, 1.0)
    factors = np.power(x, exponent) / np.power(w, 1 - exponent)
    factors /= np.exp(np.mean(np.log(factors)))  # the tensor as a whole keeps its size
    clipped: Float32 = np.clip(factors, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)
    return clipped


def smooth_layer(
    weights: dict[str, Float32], amax: dict[str, NDArray[Any]], spec: ModelSpec, exponent: float
) -> dict[str, Float32]:
    """Smooth every tap of one layer; the weights are changed in place.

    Args:
        weights: name without the layer's prefix → array; linear layers [out, in].
        amax: tap → [in] largest magnitudes of the channels.

    Returns:
        tap → what its channels were divided by, [in].
    """
    divided = {}
    for tap, modules in TAPS.items():
        readers = [weights[f"{module}.weight"] for module in modules]
        divided[tap] = _fold(tap, amax[tap], readers, weights, spec, exponent)
        for weight in readers:
            weight *= divided[tap]
    return divided


def _fold(
    tap: str,
    amax: NDArray[Any],
    readers: list[Float32],
    weights: dict[str, Float32],
    spec: ModelSpec,
    exponent: float,
) -> Float32:
    producer = PRODUCERS[tap]
    if tap != "self_attn.attention_flat":
        factors = smoothing_factors(amax, readers, exponent)
        _divide(weights, producer, factors)
        return factors
    # Query heads of a group read the same value head, so its channels share a factor.
    group, head_dim = spec.num_heads // spec.num_kv_heads, spec.head_dim
    shared = amax.reshape(spec.num_kv_heads, group, head_dim).max(axis=1).reshape(-1)
    columns = [np.abs(w).max(axis=0).reshape(spec.num_kv_heads, group, head_dim).max(axis=1) for w in readers]
    factors = smoothing_factors(shared, [column.reshape(1, -1) for column in columns], exponent)
    _divide(weights, producer, factors)
    return np.repeat(factors.reshape(spec.num_kv_heads, 1, head_dim), group, axis=1).reshape(-1)


def _divide(weights: dict[str, Float32], producer: str, factors: Float32) -> None:
    for kind in ("weight", "bias"):
        name = f"{producer}.{kind}"
        if name in weights:
            weight = weights[name]
            weight /= factors[:, None] if weight.ndim == 2 else factors
