"""Attention over the slots' KV caches: decode (one token a slot) and prefill (packed chunks of prompts).

Keys and values: [max_num_seqs, KV_HEADS, max_seq_len, D]. A decode program computes all query heads of one key head, so
that each key is read once. A long cache is split over several programs (flash decoding); the last one to finish merges
their results. Lengths are tensors, so one captured graph serves all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import begin, sum_of_parts, wait

MERGED = tl.constexpr(8)  # partial results of a split cache that the merge loads at once


@triton.jit
def _rotated(
    parts, bias, norm, cos, sin, offsets, mask, d, position, part_stride, eps,
    D: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """Heads of the projection, normed and rotated, as halves [heads, D / 2]. offsets: of the first half in a part."""
    HALF: tl.constexpr = D // 2
    a, b = _halves(parts, bias, offsets, mask, part_stride, D, NUM_PARTS, HAS_BIAS)
    if QK_NORM:
        inverse = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        a *= inverse * tl.load(norm + d, mask=d < HALF, other=0.0).to(tl.float32)
        b *= inverse * tl.load(norm + d + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    c = tl.load(cos + position * HALF + d, mask=d < HALF, other=1.0)
    s = tl.load(sin + position * HALF + d, mask=d < HALF, other=0.0)
    return a * c - b * s, b * c + a * s


@triton.jit
def _halves(parts, bias, offsets, mask, part_stride, D: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    HALF: tl.constexpr = D // 2
    row = offsets[0]
    column = offsets[1]
    a = sum_of_parts(parts, row + column, mask, part_stride, NUM_PARTS)
    b = sum_of_parts(parts, row + column + HALF, mask, part_stride, NUM_PARTS)
    if HAS_BIAS:
        a += tl.load(bias + column, mask=mask, other=0.0)
        b += tl.load(bias + column + HALF, mask=mask, other=0.0)
    return a, b


@triton.jit
def decode_attention(
    qkv,  # [NUM_PARTS, M, (HEADS + 2 KV_HEADS) D]
    bias,  # float32
    norms,  # [2, D]: of q and of k
    cos,  # [max_seq_len, D / 2] float32
    sin,
    positions,  # [M] int64, where each slot's token goes; negative: no token
    keys,
    values,
    partial,  # [M, KV_HEADS, SPLITS, GROUP, D] float32
    partial_max,  # [M, KV_HEADS, SPLITS, GROUP] float32
    partial_sum,
    finished_splits,  # [M, KV_HEADS] int32, 0 before and after
    out,  # [M, HEADS, D]
    amax,  # [M] float32, raised to the largest |out|
    part_stride,
    max_seq_len,
    scale,  # of the scores, times log2(e)
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # >= HEADS / KV_HEADS, a power of two, at least 16
    BLOCK_HALF: tl.constexpr,  # >= D / 2, likewise
    BLOCK: tl.constexpr,  # positions read at a time
    SPLITS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    EARLY: tl.constexpr,  # load the first block before waiting; worth it where few programs run
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotate q and k of each slot's token, write its k and v to the cache, attend to all positions up to it."""
    begin(PDL)
    HALF: tl.constexpr = D // 2
    SHARED: tl.constexpr = HEADS // KV_HEADS
    split, head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + m)
    g = tl.arange(0, GROUP)[:, None]
    d = tl.arange(0, BLOCK_HALF)[None, :]
    d_column = tl.arange(0, BLOCK_HALF)[:, None]
    n = tl.arange(0, BLOCK)
    length = position + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK  # positions of a split
    first = split * span
    last = tl.minimum(first + span, position)  # cached positions end here
    base = (m * KV_HEADS + head) * max_seq_len
    inside = first + n < last
    key = (base + first + n)[None, :] * D + d_column
    key_mask = inside[None, :] & (d_column < HALF)
    value = (base + first + n)[:, None] * D + d
    value_mask = inside[:, None] & (d < HALF)
    if EARLY:
        # Earlier steps wrote these cache entries, not the kernels just before this one: no need to wait.
        k_low = tl.load(keys + key, mask=key_mask, other=0.0)
        k_high = tl.load(keys + key + HALF, mask=key_mask, other=0.0)
        v_low = tl.load(values + value, mask=value_mask, other=0.0)
        v_high = tl.load(values + value + HALF, mask=value_mask, other=0.0)
    wait(PDL)
    if first < length:
        dtype = keys.dtype.element_ty
        row = m * ((HEADS + 2 * KV_HEADS) * D)
        q_mask = (g < SHARED) & (d < HALF)
        q_low, q_high = _rotated(
            qkv, bias, norms, cos, sin, (row, (head * SHARED + g) * D + d), q_mask, d, position, part_stride, eps,
            D, NUM_PARTS, HAS_BIAS, QK_NORM,
        )  # fmt: skip
        q_low, q_high = q_low.to(dtype), q_high.to(dtype)
        best = tl.full([GROUP], -float("inf"), tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        low = tl.zeros([GROUP, BLOCK_HALF], tl.float32)
        high = tl.zeros([GROUP, BLOCK_HALF], tl.float32)
        if first + span > position:  # the new token belongs to this split
            mask = d < HALF
            new_k_low, new_k_high = _rotated(
                qkv, bias, norms + D, cos, sin, (row, (HEADS + head) * D + d), mask, d, position, part_stride, eps,
                D, NUM_PARTS, HAS_BIAS, QK_NORM,
            )  # fmt: skip
            new_v_low, new_v_high = _halves(
                qkv, bias, (row, (HEADS + KV_HEADS + head) * D + d), mask, part_stride, D, NUM_PARTS, HAS_BIAS
            )
            new_k_low, new_k_high = new_k_low.to(dtype), new_k_high.to(dtype)
            new_v_low, new_v_high = new_v_low.to(dtype), new_v_high.to(dtype)
            to_cache = (base + position) * D + d
            tl.store(keys + to_cache, new_k_low, mask=mask)
            tl.store(keys + to_cache + HALF, new_k_high, mask=mask)
            tl.store(values + to_cache, new_v_low, mask=mask)
            tl.store(values + to_cache + HALF, new_v_high, mask=mask)
            best = tl.sum(q_low.to(tl.float32) * new_k_low.to(tl.float32), axis=1)
            best = (best + tl.sum(q_high.to(tl.float32) * new_k_high.to(tl.float32), axis=1)) * scale
            total += 1.0
            low += new_v_low.to(tl.float32)
            high += new_v_high.to(tl.float32)
        behind = first
        if EARLY:
            behind += BLOCK
            best, total, low, high = _decode_block(
                q_low, q_high, k_low, k_high, v_low, v_high, inside, best, total, low, high, scale, PRECISION
            )
        for start in range(behind, last, BLOCK):
            inside = start + n < last
            key = (base + start + n)[None, :] * D + d_column
            key_mask = inside[None, :] & (d_column < HALF)
            value = (base + start + n)[:, None] * D + d
            value_mask = inside[:, None] & (d < HALF)
            best, total, low, high = _decode_block(
                q_low, q_high,
                tl.load(keys + key, mask=key_mask, other=0.0),
                tl.load(keys + key + HALF, mask=key_mask, other=0.0),
                tl.load(values + value, mask=value_mask, other=0.0),
                tl.load(values + value + HALF, mask=value_mask, other=0.0),
                inside, best, total, low, high, scale, PRECISION,
            )  # fmt: skip
        is_last = first < length
        if SPLITS > 1:
            num_splits = tl.cdiv(length, span)
            if num_splits > 1:
                group = m * KV_HEADS + head
                lane = tl.arange(0, GROUP)
                rows = (group * SPLITS + split) * GROUP
                tl.store(partial_max + rows + lane, best)
                tl.store(partial_sum + rows + lane, total)
                tl.store(partial + (rows + g) * D + d, low, mask=q_mask)
                tl.store(partial + (rows + g) * D + d + HALF, high, mask=q_mask)
                tl.debug_barrier()  # all threads' stores come before the one thread's atomic
                is_last = tl.atomic_add(finished_splits + group, 1, sem="acq_rel") == num_splits - 1
                if is_last:
                    tl.store(finished_splits + group, 0)
                    others = tl.arange(0, SPLITS)[:, None]
                    each = (group * SPLITS + others) * GROUP + lane[None, :]
                    maxima = tl.load(
                        partial_max + each, mask=others < num_splits, other=-float("inf"), cache_modifier=".cg"
                    )
                    sums = tl.load(partial_sum + each, mask=others < num_splits, other=0.0, cache_modifier=".cg")
                    best = tl.max(maxima, axis=0)
                    total = tl.sum(sums * tl.exp2(maxima - best[None, :]), axis=0)
                    low = tl.zeros([GROUP, BLOCK_HALF], tl.float32)
                    high = tl.zeros([GROUP, BLOCK_HALF], tl.float32)
                    # Merged in split order, whichever program finished last.
                    for other in tl.range(0, num_splits, loop_unroll_factor=MERGED):
                        rows = (group * SPLITS + other) * GROUP
                        share = tl.exp2(tl.load(partial_max + rows + lane, cache_modifier=".cg") - best)[:, None]
                        at = partial + (rows + g) * D + d
                        low += share * tl.load(at, mask=q_mask, other=0.0, cache_modifier=".cg")
                        high += share * tl.load(at + HALF, mask=q_mask, other=0.0, cache_modifier=".cg")
        if is_last:
            low /= total[:, None]
            high /= total[:, None]
            to_out = out + (m * HEADS + head * SHARED + g) * D + d
            tl.store(to_out, low.to(out.dtype.element_ty), mask=q_mask)
            tl.store(to_out + HALF, high.to(out.dtype.element_ty), mask=q_mask)
            if HAS_AMAX:
                largest = tl.max(tl.where(q_mask, tl.maximum(tl.abs(low), tl.abs(high)), 0.0))
                tl.atomic_max(amax + m, largest)


@triton.jit
def _decode_block(
    q_low, q_high, k_low, k_high, v_low, v_high, inside, best, total, low, high, scale, PRECISION: tl.constexpr
):  # fmt: skip
    """One block of keys [D / 2, BLOCK] and values [BLOCK, D / 2], in halves, into the running softmax."""
    score = tl.dot(q_low, k_low, input_precision=PRECISION)
    score = tl.dot(q_high, k_high, score, input_precision=PRECISION)
    score = tl.where(inside[None, :], score * scale, -float("inf"))
    new_best = tl.maximum(best, tl.max(score, axis=1))
    shrink = tl.exp2(best - new_best)
    p = tl.exp2(score - new_best[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    p = p.to(v_low.dtype)
    low = tl.dot(p, v_low, low * shrink[:, None], input_precision=PRECISION)
    high = tl.dot(p, v_high, high * shrink[:, None], input_precision=PRECISION)
    return new_best, total, low, high


@triton.jit
def prefill_attention(
    q,  # [M, HEADS, D], rotated
    keys,
    values,
    tiles,  # [num_tiles, 4] int32: slot, position of the first query, its row in q, how many queries; 0 of these: none
    out,  # [M, HEADS, D]
    max_seq_len,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM queries of one chunk and head attend to their slot's cache up to their own positions."""
    begin(PDL)
    wait(PDL)
    tile, head = tl.program_id(1), tl.program_id(0)
    slot = tl.load(tiles + 4 * tile).to(tl.int64)
    start = tl.load(tiles + 4 * tile + 1)
    row = tl.load(tiles + 4 * tile + 2).to(tl.int64)
    count = tl.load(tiles + 4 * tile + 3)
    if count > 0:
        m, n = tl.arange(0, BM), tl.arange(0, BN)
        d = tl.arange(0, BLOCK_D)
        base = (slot * KV_HEADS + head // (HEADS // KV_HEADS)) * max_seq_len
        q_offsets = ((row + m)[:, None] * HEADS + head) * D + d[None, :]
        q_mask = (m < count)[:, None] & (d < D)[None, :]
        queries = tl.load(q + q_offsets, mask=q_mask, other=0.0)
        best = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BLOCK_D], tl.float32)
        end = start + count
        whole = (start + 1) // BN * BN  # every query sees all positions before this one
        for first in range(0, whole, BN):
            best, total, acc = _attend(
                queries, keys, values, base, first, n, d, start + m, end, best, total, acc, scale, D, False, PRECISION
            )
        for first in range(whole, end, BN):
            best, total, acc = _attend(
                queries, keys, values, base, first, n, d, start + m, end, best, total, acc, scale, D, True, PRECISION
            )
        acc /= total[:, None]
        tl.store(out + q_offsets, acc.to(out.dtype.element_ty), mask=q_mask)


@triton.jit
def _attend(
    queries, keys, values, base, first, n, d, positions, end, best, total, acc, scale,
    D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys and values into the running softmax."""
    offsets = (base + first + n) * D
    key_mask = (d < D)[:, None]
    value_mask = (d < D)[None, :]
    if MASKED:
        key_mask = key_mask & (first + n < end)[None, :]
        value_mask = value_mask & (first + n < end)[:, None]
    k = tl.load(keys + offsets[None, :] + d[:, None], mask=key_mask, other=0.0)
    score = tl.dot(queries, k, input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where(first + n[None, :] <= positions[:, None], score, -float("inf"))
    new_best = tl.maximum(best, tl.max(score, axis=1))
    shrink = tl.exp2(best - new_best)
    p = tl.exp2(score - new_best[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    v = tl.load(values + offsets[:, None] + d[None, :], mask=value_mask, other=0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_best, total, acc
