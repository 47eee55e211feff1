"""Attention over the slots' KV caches: decode (one token a slot) and prefill (packed chunks of prompts).

Keys and values: [max_num_seqs, KV_HEADS, max_seq_len, D], or [blocks, KV_HEADS, PAGE, D] and a table of each slot's
blocks; then an iteration reads within one block, and sums in the same order. KV_INT8: they are 8-bit integers, and each
head of each position has a scale. A decode program computes all query heads of one key head, so that each key is read
once. A long cache is split over several programs (flash decoding); the last one to finish merges their results.
`share_out` decides once a step which program attends to what, so that a few long texts among short ones hold up nobody.
Lengths are tensors, so one captured graph serves all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import (
    begin,
    cache_codes,
    cache_row,
    cache_scale,
    publish,
    running_softmax,
    sum_of_parts,
    wait,
)

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
def share_out(
    positions,  # [M] int64, where each slot's token goes; negative: no token
    item_rows,  # [ITEMS] int32: whose positions an item has; -1: there is no such item
    item_splits,  # [ITEMS] int32: which of the row's splits; a row's items stand in their order
    spans,  # [M] int32: positions of each of a row's splits
    count,  # M
    ITEMS: tl.constexpr,
    EXTRA: tl.constexpr,  # ITEMS - M: all rows have splits of the same length, which uses no more items than that
    MOST: tl.constexpr,  # splits of a row at most
    SPLITS: tl.constexpr,  # each row has so many, whatever the others' lengths; 0: see EXTRA
    BLOCK: tl.constexpr,  # a split's length is a multiple of it
    ROWS: tl.constexpr,  # >= M, a power of two
    ALL_ITEMS: tl.constexpr,  # >= ITEMS, likewise
    PDL: tl.constexpr,
):
    """Cut the cached positions of all rows into splits. One program.

    It doesn't `begin`: the next kernels start when it has ended, and may read its results before they wait.
    """
    wait(PDL)
    m = tl.arange(0, ROWS)
    length = tl.maximum(tl.load(positions + m, mask=m < count, other=-1).to(tl.int32) + 1, 0)
    if SPLITS > 0:
        span = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK), 1) * BLOCK
    else:
        even = tl.maximum(tl.cdiv(tl.sum(length), EXTRA), tl.cdiv(tl.max(length), MOST))
        span = tl.full([ROWS], BLOCK, tl.int32) * tl.maximum(tl.cdiv(even, BLOCK), 1)
    splits = tl.cdiv(length, span)
    first = tl.cumsum(splits, 0) - splits
    item = tl.arange(0, ALL_ITEMS)
    tl.store(item_rows + item, tl.full([ALL_ITEMS], -1, tl.int32), mask=(item >= tl.sum(splits)) & (item < ITEMS))
    tl.store(spans + m, span, mask=m < count)
    for split in range(0, tl.max(splits)):
        tl.store(item_rows + first + split, m, mask=split < splits)
        tl.store(item_splits + first + split, tl.full([ROWS], 0, tl.int32) + split, mask=split < splits)
    publish(PDL)


@triton.jit
def decode_attention(
    qkv,  # [NUM_PARTS, M, (HEADS + 2 KV_HEADS) D]
    bias,  # float32
    norms,  # [2, D]: of q and of k
    cos,  # [max_seq_len, D / 2] float32
    sin,
    positions,  # see share_out
    item_rows,
    item_splits,
    spans,
    keys,
    values,
    table,  # [max_num_seqs, extent] int32
    key_scales,  # [blocks, KV_HEADS, PAGE] bfloat16
    value_scales,
    partial,  # [ITEMS, KV_HEADS, GROUP, D] float32
    partial_max,  # [ITEMS, KV_HEADS, GROUP] float32
    partial_sum,
    finished_splits,  # [M, KV_HEADS] int32, 0 before and after
    out,  # [M, HEADS, D]
    amax,  # [M] float32, raised to the largest |out|
    part_stride,
    extent,  # of a slot: positions, or blocks
    scale,  # of the scores, times log2(e)
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # >= HEADS / KV_HEADS, a power of two, at least 16
    BLOCK_HALF: tl.constexpr,  # >= D / 2, likewise
    BLOCK: tl.constexpr,  # positions read at a time
    MOST: tl.constexpr,  # >= the splits of a row, a power of two
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    EARLY: tl.constexpr,  # load the first block before waiting; worth it where few programs run
    PAGE: tl.constexpr,  # see cache_row; a multiple of BLOCK
    KV_INT8: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotate q and k of each slot's token, write its k and v to the cache, attend to all positions up to it."""
    begin(PDL)
    HALF: tl.constexpr = D // 2
    SHARED: tl.constexpr = HEADS // KV_HEADS
    head, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(item_rows + item)
    m = tl.maximum(row, 0).to(tl.int64)
    split = tl.load(item_splits + item)
    position = tl.where(row < 0, -1, tl.load(positions + m))
    g = tl.arange(0, GROUP)[:, None]
    d = tl.arange(0, BLOCK_HALF)[None, :]
    d_column = tl.arange(0, BLOCK_HALF)[:, None]
    n = tl.arange(0, BLOCK)
    length = position + 1
    span = tl.load(spans + m)
    first = tl.where(row < 0, 0, split) * span
    last = tl.minimum(first + span, position)  # cached positions end here
    inside = first + n < last
    rows = cache_row(table, m, head, first, first < last, extent, KV_HEADS, PAGE) + n
    key = rows[None, :] * D + d_column
    key_mask = inside[None, :] & (d_column < HALF)
    value = rows[:, None] * D + d
    value_mask = inside[:, None] & (d < HALF)
    if EARLY:
        # Earlier steps wrote these cache entries, not the kernels just before this one: no need to wait.
        k_low = tl.load(keys + key, mask=key_mask, other=0.0)
        k_high = tl.load(keys + key + HALF, mask=key_mask, other=0.0)
        v_low = tl.load(values + value, mask=value_mask, other=0.0)
        v_high = tl.load(values + value + HALF, mask=value_mask, other=0.0)
        k_scale, v_scale = _scales(key_scales, value_scales, rows, inside, KV_INT8)
    wait(PDL)
    if first < length:
        if KV_INT8:  # noqa: SIM108 - decided when the kernel is compiled
            dtype = tl.float32 if PRECISION == "ieee" else tl.bfloat16
        else:
            dtype = keys.dtype.element_ty
        projected = m * ((HEADS + 2 * KV_HEADS) * D)
        q_mask = (g < SHARED) & (d < HALF)
        q_low, q_high = _rotated(
            qkv, bias, norms, cos, sin, (projected, (head * SHARED + g) * D + d), q_mask, d, position, part_stride, eps,
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
                qkv, bias, norms + D, cos, sin, (projected, (HEADS + head) * D + d), mask, d, position, part_stride,
                eps, D, NUM_PARTS, HAS_BIAS, QK_NORM,
            )  # fmt: skip
            new_v_low, new_v_high = _halves(
                qkv, bias, (projected, (HEADS + KV_HEADS + head) * D + d), mask, part_stride, D, NUM_PARTS, HAS_BIAS
            )
            new_row = cache_row(table, m, head, position, True, extent, KV_HEADS, PAGE)
            new_k_low, new_k_high = _store(keys, key_scales, new_row, d, new_k_low, new_k_high, D, KV_INT8)
            new_v_low, new_v_high = _store(values, value_scales, new_row, d, new_v_low, new_v_high, D, KV_INT8)
            best = tl.sum(q_low.to(tl.float32) * new_k_low.to(tl.float32), axis=1)
            best = (best + tl.sum(q_high.to(tl.float32) * new_k_high.to(tl.float32), axis=1)) * scale
            total += 1.0
            low += new_v_low.to(tl.float32)
            high += new_v_high.to(tl.float32)
        behind = first
        if EARLY:
            behind += BLOCK
            best, total, low, high = _decode_block(
                q_low, q_high, k_low, k_high, v_low, v_high, k_scale, v_scale, inside, best, total, low, high, scale,
                KV_INT8, PRECISION,
            )  # fmt: skip
        for start in range(behind, last, BLOCK):
            inside = start + n < last
            rows = cache_row(table, m, head, start, True, extent, KV_HEADS, PAGE) + n
            key = rows[None, :] * D + d_column
            key_mask = inside[None, :] & (d_column < HALF)
            value = rows[:, None] * D + d
            value_mask = inside[:, None] & (d < HALF)
            k_scale, v_scale = _scales(key_scales, value_scales, rows, inside, KV_INT8)
            best, total, low, high = _decode_block(
                q_low, q_high,
                tl.load(keys + key, mask=key_mask, other=0.0),
                tl.load(keys + key + HALF, mask=key_mask, other=0.0),
                tl.load(values + value, mask=value_mask, other=0.0),
                tl.load(values + value + HALF, mask=value_mask, other=0.0),
                k_scale, v_scale, inside, best, total, low, high, scale, KV_INT8, PRECISION,
            )  # fmt: skip
        is_last = first < length
        num_splits = tl.cdiv(length, span)
        if num_splits > 1:
            lane = tl.arange(0, GROUP)
            own = (item * KV_HEADS + head) * GROUP
            tl.store(partial_max + own + lane, best)
            tl.store(partial_sum + own + lane, total)
            tl.store(partial + (own + g) * D + d, low, mask=q_mask)
            tl.store(partial + (own + g) * D + d + HALF, high, mask=q_mask)
            tl.debug_barrier()  # all threads' stores come before the one thread's atomic
            group = m * KV_HEADS + head
            is_last = tl.atomic_add(finished_splits + group, 1, sem="acq_rel") == num_splits - 1
            if is_last:
                tl.store(finished_splits + group, 0)
                others = tl.arange(0, MOST)[:, None]
                each = ((item - split + others) * KV_HEADS + head) * GROUP + lane[None, :]
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
                    its = ((item - split + other) * KV_HEADS + head) * GROUP
                    share = tl.exp2(tl.load(partial_max + its + lane, cache_modifier=".cg") - best)[:, None]
                    at = partial + (its + g) * D + d
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
def _scales(key_scales, value_scales, rows, inside, KV_INT8: tl.constexpr):
    """The scales of a block's keys and values; where they aren't codes, something that isn't read."""
    if KV_INT8:
        k_scale = tl.load(key_scales + rows, mask=inside, other=1.0).to(tl.float32)
        v_scale = tl.load(value_scales + rows, mask=inside, other=1.0).to(tl.float32)
        return k_scale, v_scale
    else:
        return inside, inside


@triton.jit
def _store(cache, scales, row, d, low, high, D: tl.constexpr, KV_INT8: tl.constexpr):
    """Write a head's halves [1, D / 2] to a row of the cache; the halves that will be read from it."""
    mask = d < D // 2
    at = cache + row * D + d
    if KV_INT8:
        scale = cache_scale(tl.max(tl.where(mask, tl.maximum(tl.abs(low), tl.abs(high)), 0.0)))
        low, high = cache_codes(low, scale), cache_codes(high, scale)
        tl.store(scales + row, scale.to(scales.dtype.element_ty))
        tl.store(at, low.to(cache.dtype.element_ty), mask=mask)
        tl.store(at + D // 2, high.to(cache.dtype.element_ty), mask=mask)
        return low * scale, high * scale
    else:
        low, high = low.to(cache.dtype.element_ty), high.to(cache.dtype.element_ty)
        tl.store(at, low, mask=mask)
        tl.store(at + D // 2, high, mask=mask)
        return low, high


@triton.jit
def _decode_block(
    q_low, q_high, k_low, k_high, v_low, v_high, k_scale, v_scale, inside, best, total, low, high, scale,
    KV_INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys [D / 2, BLOCK] and values [BLOCK, D / 2], in halves, into the running softmax."""
    score = tl.dot(q_low, k_low.to(q_low.dtype), input_precision=PRECISION)
    score = tl.dot(q_high, k_high.to(q_low.dtype), score, input_precision=PRECISION)
    if KV_INT8:
        score *= k_scale[None, :]
    score = tl.where(inside[None, :], score * scale, -float("inf"))
    new_best = tl.maximum(best, tl.max(score, axis=1))
    shrink = tl.exp2(best - new_best)
    p = tl.exp2(score - new_best[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    if KV_INT8:
        p *= v_scale[None, :]
    p = p.to(q_low.dtype)
    low = tl.dot(p, v_low.to(q_low.dtype), low * shrink[:, None], input_precision=PRECISION)
    high = tl.dot(p, v_high.to(q_low.dtype), high * shrink[:, None], input_precision=PRECISION)
    return new_best, total, low, high


@triton.jit
def prefill_attention(
    q,  # [M, HEADS, D], rotated
    keys,
    values,
    table,
    key_scales,
    value_scales,
    tiles,  # [num_tiles, 4] int32: slot, position of the first query, its row in q, how many queries; 0 of these: none
    out,  # [M, HEADS, D]
    extent,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,  # see cache_row; a multiple of BN
    KV_INT8: tl.constexpr,
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
        kv_head = head // (HEADS // KV_HEADS)
        q_offsets = ((row + m)[:, None] * HEADS + head) * D + d[None, :]
        q_mask = (m < count)[:, None] & (d < D)[None, :]
        queries = tl.load(q + q_offsets, mask=q_mask, other=0.0)
        best = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BLOCK_D], tl.float32)
        end = start + count
        whole = (start + 1) // BN * BN  # every query sees all positions before this one
        for first in range(0, whole, BN):
            rows = cache_row(table, slot, kv_head, first, True, extent, KV_HEADS, PAGE) + n
            best, total, acc = _attend(
                queries, keys, values, key_scales, value_scales, rows, first + n, d, start + m, end, best, total, acc,
                scale, D, False, KV_INT8, PRECISION,
            )  # fmt: skip
        for first in range(whole, end, BN):
            rows = cache_row(table, slot, kv_head, first, True, extent, KV_HEADS, PAGE) + n
            best, total, acc = _attend(
                queries, keys, values, key_scales, value_scales, rows, first + n, d, start + m, end, best, total, acc,
                scale, D, True, KV_INT8, PRECISION,
            )  # fmt: skip
        acc /= total[:, None]
        tl.store(out + q_offsets, acc.to(out.dtype.element_ty), mask=q_mask)


@triton.jit
def _attend(
    queries, keys, values, key_scales, value_scales, rows, cached, d, positions, end, best, total, acc, scale,
    D: tl.constexpr, MASKED: tl.constexpr, KV_INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys and values, of the positions `cached` at `rows`, into the running softmax."""
    offsets = rows * D
    inside = cached < end
    key_mask = (d < D)[:, None]
    value_mask = (d < D)[None, :]
    if MASKED:
        key_mask = key_mask & inside[None, :]
        value_mask = value_mask & inside[:, None]
    k = tl.load(keys + offsets[None, :] + d[:, None], mask=key_mask, other=0.0)
    score = tl.dot(queries, k.to(queries.dtype), input_precision=PRECISION)
    k_scale, v_scale = _scales(key_scales, value_scales, rows, inside, KV_INT8)
    if KV_INT8:
        score *= k_scale[None, :]
    if MASKED:
        score = tl.where(cached[None, :] <= positions[:, None], score, -float("inf"))
    p, best, total, shrink = running_softmax(score, best, total, scale)
    v = tl.load(values + offsets[:, None] + d[None, :], mask=value_mask, other=0.0)
    if KV_INT8:
        p *= v_scale[None, :]
    acc = tl.dot(p.to(queries.dtype), v.to(queries.dtype), acc * shrink[:, None], input_precision=PRECISION)
    return best, total, acc
