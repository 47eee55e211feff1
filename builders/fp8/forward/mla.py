"""Latent attention in arrays: keys and values of all heads are made from the latents."""

from __future__ import annotations

from deepseek_triton.builders.fp8.forward.gqa import rotated
from deepseek_triton.builders.fp8.forward.indexer import not_chosen
from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.rounding.arrays import Array
from deepseek_triton.ensemble.decoder.mla import (
    ATTENDED,
    INNER_NORM_EPS,
    KV_A,
    KV_B,
    KV_NORM,
    NORM,
    OUT,
    Q_A,
    Q_NORM,
    LatentAttention,
)


def run_latent_attention(values: LayerValues, part: LatentAttention, hidden: Array) -> Array:
    """hidden [..., seq_len, hidden_size] plus attention's output."""
    xp, lead, length, sizes = values.xp, hidden.shape[:-2], hidden.shape[-2], part.options
    nope, rank = sizes.qk_nope_head_dim, sizes.kv_lora_rank
    normed = values.taps[NORM] = values.norm(hidden, NORM)
    query_input = normed
    if sizes.q_lora_rank is not None:
        query_input = values.taps[Q_NORM] = values.norm(values.linear(normed, Q_A), Q_NORM, INNER_NORM_EPS)
    query = values.linear(query_input, part.query.module).reshape(*lead, length, part.num_heads, part.qk_head_dim)
    query = xp.swapaxes(query, -3, -2)

    compressed = values.linear(normed, KV_A)
    latents = values.norm(compressed[..., :rank], KV_NORM, INNER_NORM_EPS)[..., None, :, :]
    latents, rotary_keys = values.cached(latents, rotated(values, compressed[..., None, :, rank:]))
    total = latents.shape[-2]
    made = values.linear(latents[..., 0, :, :], KV_B).reshape(*lead, total, part.num_heads, -1)
    made = xp.swapaxes(made, -3, -2)  # [..., num_heads, kv_len, nope, then values]

    scores = query[..., :nope] @ xp.swapaxes(made[..., :nope], -2, -1)
    scores = scores + rotated(values, query[..., nope:]) @ xp.swapaxes(rotary_keys, -2, -1)
    scores = scores * part.softmax_scale
    if sizes.indexer is not None:
        scores = scores + not_chosen(values, sizes.indexer, normed, query_input)[..., None, :, :]
    elif length > 1:
        scores = scores + values.causal_mask(length, total)
    scores = xp.exp(scores - xp.amax(scores, -1, keepdims=True))
    attended = (scores / xp.sum(scores, -1, keepdims=True)) @ made[..., nope:]
    flat = values.taps[ATTENDED] = xp.swapaxes(attended, -3, -2).reshape(*lead, length, -1)
    return hidden + values.linear(flat, OUT)
