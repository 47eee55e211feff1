"""The row-wise kernels between matrix products: embedding, norm, quantisation to E4M3, SiLU, rotary embedding.

One program computes one row. The residual stream is float32: it is small beside the weights, and rounding it would add
an error in every layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import (
    begin,
    cache_codes,
    cache_row,
    cache_scale,
    sum_of_parts,
    to_codes,
    token_scale,
    wait,
)
from deepseek_triton.ensemble.engine.runners.cuda.kernels.exchange import sum_over_ranks


@triton.jit
def embed_rows(
    ids,  # [M] int64; negative: the row's entry in last_tokens
    last_tokens,  # [M] int64
    embedding,  # [vocab, H]
    hidden,  # [M, H] float32
    zero,  # [1] float32, set to 0
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden = embedding[ids]."""
    begin(PDL)
    wait(PDL)
    m = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + m)
    if HAS_LAST:
        if token < 0:
            token = tl.load(last_tokens + m)
    row = tl.load(embedding + token * H + column, mask=column < H, other=0.0)
    tl.store(hidden + m * H + column, row.to(tl.float32), mask=column < H)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(zero, 0.0)


@triton.jit
def norm_rows(
    hidden,  # [*, H] float32; row m is hidden[rows[m]] with HAS_ROWS
    rows,  # [M] int64
    parts,  # [NUM_PARTS, M, H], added to the residual stream first
    bias,  # [H] float32, likewise
    norm_weight,  # [H]
    out,  # [M, H] codes, or the network's dtype
    out_scale,  # [M] float32
    plain,  # [M, H] in the network's dtype, for HAS_PLAIN
    part_stride,
    eps,
    peer_buffers,  # this and the next two: for the sum over all ranks, see exchange.py
    counts,
    given_up,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_PLAIN: tl.constexpr,
    FP8: tl.constexpr,
    MAX_PEER_ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden += Σ parts + bias; out = norm(hidden). With HAS_ROWS hidden is not written back."""
    begin(PDL)
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < H
    weight = tl.load(norm_weight + column, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    source = m
    if HAS_ROWS:
        source = tl.load(rows + m)
    x = tl.load(hidden + source * H + column, mask=mask, other=0.0)
    if NUM_PARTS:
        added = sum_of_parts(parts, m * H + column, mask, part_stride, NUM_PARTS)
        if RANKS > 1:
            added = sum_over_ranks(
                added, peer_buffers, counts, given_up, m, column, mask, BLOCK, MAX_PEER_ROWS, RANK, RANKS
            )
        x += added
        if HAS_BIAS:
            x += tl.load(bias + column, mask=mask, other=0.0)
        if not HAS_ROWS:  # nothing reads the stream after chosen rows, and a row may be chosen twice
            tl.store(hidden + source * H + column, x, mask=mask)
    y = x * tl.rsqrt(tl.sum(x * x) / H + eps) * weight
    if HAS_PLAIN:
        tl.store(plain + m * H + column, y.to(plain.dtype.element_ty), mask=mask)
    if FP8:
        scale = token_scale(tl.max(tl.abs(y)))
        tl.store(out + m * H + column, to_codes(y, scale), mask=mask)
        tl.store(out_scale + m, scale)
    else:
        tl.store(out + m * H + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def quantise_rows(
    x,  # [M, K]
    out,  # [M, K] codes
    out_scale,  # [M] float32
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = x / scale in E4M3, with one scale a row."""
    begin(PDL)
    wait(PDL)
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + m * K + column, mask=column < K, other=0.0).to(tl.float32)
    scale = token_scale(tl.max(tl.abs(value)))
    tl.store(out + m * K + column, to_codes(value, scale), mask=column < K)
    tl.store(out_scale + m, scale)


@triton.jit
def _silu(parts, bias, m, column, part_stride, I: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    mask = column < I
    gate = sum_of_parts(parts, m * (2 * I) + column, mask, part_stride, NUM_PARTS)
    up = sum_of_parts(parts, m * (2 * I) + I + column, mask, part_stride, NUM_PARTS)
    if HAS_BIAS:
        gate += tl.load(bias + column, mask=mask, other=0.0)
        up += tl.load(bias + I + column, mask=mask, other=0.0)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_rows(
    parts,  # [NUM_PARTS, M, 2 I]: gate, then up
    bias,  # [2 I] float32
    out,  # [M, I] codes, or the network's dtype
    out_scale,  # [M] float32
    part_stride,
    I: tl.constexpr,
    MAIN: tl.constexpr,  # columns, a power of two, at most I
    REST: tl.constexpr,  # a power of two, at least I - MAIN
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = silu(gate) * up; a program keeps its row in registers until it knows the scale of its codes."""
    begin(PDL)
    wait(PDL)
    m = tl.program_id(0).to(tl.int64)
    column, behind = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    y = _silu(parts, bias, m, column, part_stride, I, NUM_PARTS, HAS_BIAS)
    rest = _silu(parts, bias, m, behind, part_stride, I, NUM_PARTS, HAS_BIAS)
    to = out + m * I
    if FP8:
        largest = tl.maximum(tl.max(tl.abs(y)), tl.max(tl.abs(rest)))
        scale = token_scale(largest)
        tl.store(out_scale + m, scale)
        tl.store(to + column, to_codes(y, scale))
        tl.store(to + behind, to_codes(rest, scale), mask=behind < I)
    else:
        tl.store(to + column, y.to(out.dtype.element_ty))
        tl.store(to + behind, rest.to(out.dtype.element_ty), mask=behind < I)


@triton.jit
def rope_rows(
    parts,  # [NUM_PARTS, M, (HEADS + 2 KV_HEADS) D]
    bias,  # float32
    norms,  # [2, D]: of q and of k
    cos,  # [max_seq_len, D / 2] float32
    sin,
    slots,  # [M] int64
    positions,  # [M] int64; negative: no token
    q,  # [M, HEADS, D]
    keys,  # see attention.py
    values,
    table,
    key_scales,
    value_scales,
    part_stride,
    extent,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    PAGE: tl.constexpr,
    KV_INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotate q and k, and write k and v to the cache: the step of prefill between projection and attention."""
    begin(PDL)
    wait(PDL)
    HALF: tl.constexpr = D // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    m = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + m)
    if position >= 0:
        slot = tl.load(slots + m)
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        d = tl.arange(0, BLOCK_HALF)[None, :]
        mask = (head < ALL) & (d < HALF)
        offsets = head * D + d
        a = sum_of_parts(parts, m * (ALL * D) + offsets, mask, part_stride, NUM_PARTS)
        b = sum_of_parts(parts, m * (ALL * D) + offsets + HALF, mask, part_stride, NUM_PARTS)
        if HAS_BIAS:
            a += tl.load(bias + offsets, mask=mask, other=0.0)
            b += tl.load(bias + offsets + HALF, mask=mask, other=0.0)
        is_value = head >= HEADS + KV_HEADS
        if QK_NORM:
            inverse = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
            kind = tl.where(head < HEADS, 0, D) + d
            norm_mask = mask & (head < HEADS + KV_HEADS)
            a *= tl.where(is_value, 1.0, inverse * tl.load(norms + kind, mask=norm_mask, other=0.0).to(tl.float32))
            b *= tl.where(
                is_value, 1.0, inverse * tl.load(norms + kind + HALF, mask=norm_mask, other=0.0).to(tl.float32)
            )
        c = tl.where(is_value, 1.0, tl.load(cos + position * HALF + d, mask=d < HALF, other=1.0))
        s = tl.where(is_value, 0.0, tl.load(sin + position * HALF + d, mask=d < HALF, other=0.0))
        low, high = a * c - b * s, b * c + a * s
        to_q = q + m * (HEADS * D) + offsets
        tl.store(to_q, low.to(q.dtype.element_ty), mask=mask & (head < HEADS))
        tl.store(to_q + HALF, high.to(q.dtype.element_ty), mask=mask & (head < HEADS))
        is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
        key_row = cache_row(table, slot, head - HEADS, position, True, extent, KV_HEADS, PAGE)
        value_row = cache_row(table, slot, head - HEADS - KV_HEADS, position, True, extent, KV_HEADS, PAGE)
        if KV_INT8:
            magnitude = tl.where(mask, tl.maximum(tl.abs(low), tl.abs(high)), 0.0)
            scale = cache_scale(tl.max(magnitude, axis=1))[:, None]
            low, high = cache_codes(low, scale), cache_codes(high, scale)
            tl.store(key_scales + key_row, scale.to(key_scales.dtype.element_ty), mask=is_key)
            tl.store(value_scales + value_row, scale.to(value_scales.dtype.element_ty), mask=is_value & (head < ALL))
        low, high = low.to(keys.dtype.element_ty), high.to(keys.dtype.element_ty)
        tl.store(keys + key_row * D + d, low, mask=mask & is_key)
        tl.store(keys + key_row * D + d + HALF, high, mask=mask & is_key)
        tl.store(values + value_row * D + d, low, mask=mask & is_value)
        tl.store(values + value_row * D + d + HALF, high, mask=mask & is_value)
