"""Grouped-query attention in arrays, over whole sequences, or after those that a cache holds."""

from __future__ import annotations

import math

from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.rounding.arrays import Array
from deepseek_triton.ensemble.decoder.gqa import ATTENDED, NORM, OUT, GroupedQueryAttention


def run_attention(values: LayerValues, part: GroupedQueryAttention, hidden: Array) -> Array:
    """hidden [..., seq_len, hidden_size] plus attention's output."""
    xp, lead, length = values.xp, hidden.shape[:-2], hidden.shape[-2]
    normed = values.taps[NORM] = values.norm(hidden, NORM)

    def heads(name: str, num_heads: int, *, is_rotated: bool = True) -> Array:
        """Project, norm, rotate: [..., num_heads, seq_len, head_dim]."""
        split = values.linear(normed, f"self_attn.{name}_proj").reshape(*lead, length, num_heads, part.head_dim)
        if is_rotated and part.qk_norm:
            split = values.norm(split, f"self_attn.{name}_norm")
        split = xp.swapaxes(split, -3, -2)
        return rotated(values, split) if is_rotated else split

    q = heads("q", part.num_heads)
    k, v = values.cached(heads("k", part.num_kv_heads), heads("v", part.num_kv_heads, is_rotated=False))
    # Query heads of a group share a key head: [kv_heads, group, seq_len, head_dim] against [kv_heads, 1, …].
    group = part.num_heads // part.num_kv_heads
    q = q.reshape(*lead, part.num_kv_heads, group, length, part.head_dim) / math.sqrt(part.head_dim)
    scores = q @ xp.swapaxes(k, -2, -1)[..., None, :, :]
    if length > 1:
        scores = scores + values.causal_mask(length, k.shape[-2])
    scores = xp.exp(scores - xp.amax(scores, -1, keepdims=True))
    attended = (scores / xp.sum(scores, -1, keepdims=True)) @ v[..., None, :, :]
    attended = xp.swapaxes(attended.reshape(*lead, part.num_heads, length, part.head_dim), -3, -2)
    flat = values.taps[ATTENDED] = attended.reshape(*lead, length, part.q_size)
    return hidden + values.linear(flat, OUT)


def rotated(values: LayerValues, heads: Array) -> Array:
    """Rotary embedding of [..., seq_len, head_dim]: the first half of a head pairs with the second."""
    length, half = heads.shape[-2], heads.shape[-1] // 2
    positions = slice(values.start, values.start + length)
    cos, sin = values.cos[positions], values.sin[positions]
    low, high = heads[..., :half], heads[..., half:]
    return values.xp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
