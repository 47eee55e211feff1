"""Rotary position embedding tables: RopeSpec → cos and sin for every position.

Formulas: transformers' `modeling_rope_utils.py`, evaluated in float32 as there, so that long positions agree with
the reference implementation to the last bits that matter.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.decoder.rope import RopeSpec

Float32 = NDArray[np.float32]


def rope_tables(rope: RopeSpec, head_dim: int, max_seq_len: int) -> tuple[Float32, Float32]:
    """cos and sin, each [max_seq_len, head_dim / 2] float32.

    Dynamic scaling depends on how long the sequence is at the time: row p holds the frequencies of a sequence of p + 1
    tokens, which is what step-by-step decoding past the trained length uses. (A reference that prefills a prompt longer
    than the trained length in one go uses the whole prompt's frequencies for every position instead.)
    """
    positions = np.arange(max_seq_len, dtype=np.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)  # [max_seq_len, head_dim / 2]
    if rope.scaling == "dynamic":
        for position in range(rope.original_max_position_embeddings, max_seq_len):
            angles[position] = np.float32(position) * _dynamic(rope, head_dim, position + 1)
    scale = np.float32(rope.attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Float32:
    """Radians per position for each pair of channels: [head_dim / 2] float32."""
    plain = _plain(rope.theta, head_dim)
    if rope.scaling == "linear":
        return plain / np.float32(rope.factor)
    if rope.scaling == "factors":
        return plain / np.asarray(rope.frequency_factors, dtype=np.float32)
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain


def _plain(theta: float, head_dim: int) -> Float32:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Float32 = np.float32(1.0) / np.power(np.float32(theta), exponents)
    return frequencies


def _dynamic(rope: RopeSpec, head_dim: int, seq_len: int) -> Float32:
    stretch = rope.factor * seq_len / rope.original_max_position_embeddings - (rope.factor - 1)
    return _plain(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(rope: RopeSpec, plain: Float32) -> Float32:
    # Short wavelengths stay, long ones are divided by the factor, those between are blended.
    wavelengths = 2 * math.pi / plain
    original = rope.original_max_position_embeddings
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * plain / rope.factor + smooth * plain).astype(np.float32)


def _yarn(rope: RopeSpec, plain: Float32, head_dim: int) -> Float32:
    def channel_of(rotations: float) -> float:
        """The channel pair that turns `rotations` times over the original length."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = channel_of(rope.beta_fast), channel_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp needs some width
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).astype(np.float32)
