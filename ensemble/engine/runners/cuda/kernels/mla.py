"""Latent attention: every head reads one cached entry a token, the normed latent and then the rotated key.

Entries: [max_num_seqs, 1, max_seq_len, RANK + ROPE], or [blocks, 1, PAGE, RANK + ROPE] and a table of each slot's
blocks. Queries are absorbed: multiplied with the half of kv_b that makes keys, so that they read latents. What they
attend to are latents too, which the other half of kv_b turns into each head's values. A long cache is split over
several programs (flash decoding); `latent_values` merges their results. Whole prompts are cheaper with each head's own
keys and values (`prefill_heads`). Lengths are tensors, so one captured graph serves all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import (
    begin,
    cache_row,
    prefetch,
    running_softmax,
    sum_of_parts,
    to_codes,
    token_scale,
    wait,
)

ENTRY_ROWS = tl.constexpr(4)  # rows whose entries a program writes


@triton.jit
def norm_columns(
    parts,  # [NUM_PARTS, M, ROW], of which the first K columns are normed
    bias,  # [ROW] float32
    norm_weight,  # [K]
    out,  # [M, K] codes, or the network's dtype
    out_scale,  # [M] float32
    part_stride,
    eps,
    K: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = norm(Σ parts + bias) of the query's latent."""
    begin(PDL)
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < K
    weight = tl.load(norm_weight + column, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    x = sum_of_parts(parts, m * ROW + column, mask, part_stride, NUM_PARTS)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=mask, other=0.0)
    y = x * tl.rsqrt(tl.sum(x * x) / K + eps) * weight
    if FP8:
        scale = token_scale(tl.max(tl.abs(y)))
        tl.store(out + m * K + column, to_codes(y, scale), mask=mask)
        tl.store(out_scale + m, scale)
    else:
        tl.store(out + m * K + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def latent_rows(
    q,  # [Q_PARTS, M, Q_ROW], its first columns HEADS x (NOPE + ROPE)
    q_bias,  # [Q_ROW] float32
    kv,  # [KV_PARTS, M, KV_ROW], from column KV_COLUMN on RANK + ROPE
    kv_bias,  # [KV_ROW] float32
    norm,  # [RANK], of the latent
    kv_b,  # [HEADS, NOPE + VALUE, RANK]
    cos,  # [max_seq_len, ROPE / 2] float32
    sin,
    slots,  # [M] int64; not read with IS_DECODE: row m is slot m
    positions,  # [M] int64; negative: no token
    table,
    entries,  # the cache
    queries,  # [M, HEADS, RANK + ROPE]
    plain,  # [M, HEADS, NOPE], queries that are not absorbed yet; only without ABSORB
    packed,  # [M, RANK + ROPE], the entries again, row after row; only with PACK
    q_stride,
    kv_stride,
    extent,  # of a slot: positions, or blocks
    eps,
    count,  # M
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,  # >= NOPE, a power of two, at least 16
    BLOCK_HALF: tl.constexpr,  # >= ROPE / 2, a power of two
    BLOCK_RANK: tl.constexpr,  # >= RANK, a power of two
    COLUMNS: tl.constexpr,  # of the latent, that a program computes
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    KV_COLUMN: tl.constexpr,
    Q_PARTS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    HAS_KV_BIAS: tl.constexpr,
    BM: tl.constexpr,
    PAGE: tl.constexpr,
    ABSORB: tl.constexpr,
    IS_DECODE: tl.constexpr,
    PACK: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Absorb and rotate BM rows' queries; the last programs write the rows' entries to the cache."""
    begin(PDL)
    HALF: tl.constexpr = ROPE // 2
    ENTRY: tl.constexpr = RANK + ROPE
    TILES: tl.constexpr = (RANK + COLUMNS - 1) // COLUMNS if ABSORB else 1
    job = tl.program_id(1)
    r = tl.arange(0, BLOCK_HALF)[None, :]
    if job < HEADS * TILES:
        head, tile = job // TILES, job % TILES
        n = tl.arange(0, BLOCK_NOPE)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        if ABSORB:
            row = (head * (NOPE + VALUE) + n)[:, None] * RANK
            weight_mask = (n < NOPE)[:, None] & (column < RANK)[None, :]
            weight = tl.load(kv_b + row + column[None, :], mask=weight_mask, other=0.0)
        m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
        there = m < count
        wait(PDL)
        first = m * Q_ROW + head * (NOPE + ROPE)
        mask = there & (n < NOPE)[None, :]
        value = sum_of_parts(q, first + n[None, :], mask, q_stride, Q_PARTS)
        if HAS_Q_BIAS:
            value += tl.load(q_bias + head * (NOPE + ROPE) + n, mask=n < NOPE, other=0.0)[None, :]
        if ABSORB:
            # Columns times rows: with any number of rows the same instruction sums in the same order.
            rows = tl.trans(value.to(weight.dtype))
            absorbed = tl.trans(tl.dot(tl.trans(weight), rows, input_precision=PRECISION))
            to_latent = queries + (m * HEADS + head) * ENTRY + column[None, :]
            tl.store(to_latent, absorbed.to(queries.dtype.element_ty), mask=there & (column < RANK)[None, :])
        else:
            tl.store(plain + (m * HEADS + head) * NOPE + n[None, :], value.to(plain.dtype.element_ty), mask=mask)
        if tile == 0:
            c, s = _angles(cos, sin, tl.load(positions + m, mask=there, other=-1), r, HALF)
            low, high = _rotated(
                q, q_bias, c, s, first + NOPE, head * (NOPE + ROPE) + NOPE, there, r, q_stride,
                HALF, Q_PARTS, HAS_Q_BIAS,
            )  # fmt: skip
            to_rotary = queries + (m * HEADS + head) * ENTRY + RANK + r
            tl.store(to_rotary, low.to(queries.dtype.element_ty), mask=there & (r < HALF))
            tl.store(to_rotary + HALF, high.to(queries.dtype.element_ty), mask=there & (r < HALF))
    else:
        first_row = tl.program_id(0) * BM + (job - HEADS * TILES) * ENTRY_ROWS
        _write_entries(
            kv, kv_bias, norm, cos, sin, slots, positions, table, entries, packed, kv_stride, extent, eps, count,
            first_row, r, ROPE, RANK, BLOCK_RANK, KV_ROW, KV_COLUMN, KV_PARTS, HAS_KV_BIAS, PAGE, IS_DECODE, PACK, PDL,
        )  # fmt: skip


@triton.jit
def _write_entries(
    kv, kv_bias, norm, cos, sin, slots, positions, table, entries, packed, kv_stride, extent, eps, count, first_row, r,
    ROPE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, KV_ROW: tl.constexpr, KV_COLUMN: tl.constexpr,
    KV_PARTS: tl.constexpr, HAS_KV_BIAS: tl.constexpr, PAGE: tl.constexpr, IS_DECODE: tl.constexpr,
    PACK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the entries of ENTRY_ROWS rows, and write them to the cache; see latent_rows."""
    HALF: tl.constexpr = ROPE // 2
    ENTRY: tl.constexpr = RANK + ROPE
    d = tl.arange(0, BLOCK_RANK)[None, :]
    m = (first_row + tl.arange(0, ENTRY_ROWS)).to(tl.int64)[:, None]
    position = tl.load(positions + m, mask=m < count, other=-1)
    there = position >= 0
    slot = m
    if not IS_DECODE:
        slot = tl.load(slots + m, mask=there, other=0)
    to_entry = entries + cache_row(table, slot, 0, position, there, extent, 1, PAGE) * ENTRY
    c, s = _angles(cos, sin, position, r, HALF)
    weight = tl.load(norm + d, mask=d < RANK, other=0.0).to(tl.float32)
    wait(PDL)  # all loads so far are of what no kernel of the step writes
    mask = there & (d < RANK)
    first = m * KV_ROW + KV_COLUMN
    x = sum_of_parts(kv, first + d, mask, kv_stride, KV_PARTS)
    if HAS_KV_BIAS:
        x += tl.load(kv_bias + KV_COLUMN + d, mask=d < RANK, other=0.0)
    low, high = _rotated(
        kv, kv_bias, c, s, first + RANK, KV_COLUMN + RANK, there, r, kv_stride, HALF, KV_PARTS, HAS_KV_BIAS
    )
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / RANK + eps)[:, None] * weight
    tl.store(to_entry + d, x.to(entries.dtype.element_ty), mask=mask)
    tl.store(to_entry + RANK + r, low.to(entries.dtype.element_ty), mask=there & (r < HALF))
    tl.store(to_entry + RANK + HALF + r, high.to(entries.dtype.element_ty), mask=there & (r < HALF))
    if PACK:
        to_packed = packed + m * ENTRY
        tl.store(to_packed + d, x.to(packed.dtype.element_ty), mask=mask)
        tl.store(to_packed + RANK + r, low.to(packed.dtype.element_ty), mask=there & (r < HALF))
        tl.store(to_packed + RANK + HALF + r, high.to(packed.dtype.element_ty), mask=there & (r < HALF))


@triton.jit
def _angles(cos, sin, position, r, HALF: tl.constexpr):
    """cos and sin of the rotary channels [rows, ROPE / 2] at positions [rows, 1]; negative: no token."""
    mask = (position >= 0) & (r < HALF)
    c = tl.load(cos + position * HALF + r, mask=mask, other=1.0)
    s = tl.load(sin + position * HALF + r, mask=mask, other=0.0)
    return c, s


@triton.jit
def _rotated(
    parts, bias, c, s, first, bias_first, there, r, stride,
    HALF: tl.constexpr, NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The rotary channels of rows, which begin at `first` [rows, 1], rotated: halves [rows, ROPE / 2]."""
    mask = there & (r < HALF)
    a = sum_of_parts(parts, first + r, mask, stride, NUM_PARTS)
    b = sum_of_parts(parts, first + HALF + r, mask, stride, NUM_PARTS)
    if HAS_BIAS:
        a += tl.load(bias + bias_first + r, mask=r < HALF, other=0.0)
        b += tl.load(bias + bias_first + HALF + r, mask=r < HALF, other=0.0)
    return a * c - b * s, b * c + a * s


@triton.jit
def decode_latents(
    queries,  # [M, HEADS, RANK + ROPE]
    entries,
    table,  # [max_num_seqs, extent] int32
    positions,  # [M] int64; negative: no token
    partial,  # [M, SPLITS, HEADS, RANK] float32, not yet divided by partial_sum
    partial_max,  # [M, SPLITS, HEADS] float32; -inf: the split has no positions
    partial_sum,
    extent,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,  # heads of a program, a power of two, at least 16
    BLOCK_RANK: tl.constexpr,  # >= RANK, likewise
    BLOCK_ROPE: tl.constexpr,  # >= ROPE, likewise
    BLOCK: tl.constexpr,  # positions read at a time
    SPLITS: tl.constexpr,
    PAGE: tl.constexpr,  # see cache_row; a multiple of BLOCK
    PREFETCH: tl.constexpr,
    LINE: tl.constexpr,  # elements in 128 bytes
    BLOCK_LINES: tl.constexpr,  # >= (RANK + ROPE) / LINE, a power of two
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A group of one token's heads attends to a split of its slot's entries, its own among them."""
    begin(PDL)
    ENTRY: tl.constexpr = RANK + ROPE
    split, m = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    d, r, n = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE), tl.arange(0, BLOCK)
    length = tl.load(positions + m) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK  # positions of a split
    first = split * span
    last = tl.minimum(first + span, length)
    best = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    if PREFETCH:  # L2 keeps up with the new entry, which may not be written yet
        lines = tl.arange(0, BLOCK_LINES) * LINE
        ahead = tl.minimum(n, tl.maximum(last - first, 1) - 1)
        ahead += cache_row(table, m, 0, first, first < last, extent, 1, PAGE)
        prefetch(entries + ahead[:, None] * ENTRY + tl.minimum(lines, ENTRY - 1)[None, :])
    wait(PDL)
    own = (m * SPLITS + split) * HEADS + head
    if first < last:
        at = queries + (m * HEADS + head)[:, None] * ENTRY
        heads = (head < HEADS)[:, None]
        q_latent = tl.load(at + d[None, :], mask=heads & (d < RANK)[None, :], other=0.0)
        q_rotary = tl.load(at + RANK + r[None, :], mask=heads & (r < ROPE)[None, :], other=0.0)
        acc = tl.zeros([GROUP, BLOCK_RANK], tl.float32)
        for start in range(first, last, BLOCK):
            inside = start + n < last
            rows = (cache_row(table, m, 0, start, True, extent, 1, PAGE) + n)[:, None] * ENTRY
            latent = tl.load(entries + rows + d[None, :], mask=inside[:, None] & (d < RANK)[None, :], other=0.0)
            rotary = tl.load(entries + rows + RANK + r[None, :], mask=inside[:, None] & (r < ROPE)[None, :], other=0.0)
            score = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
            score = tl.dot(q_rotary, tl.trans(rotary), score, input_precision=PRECISION)
            score = tl.where(inside[None, :], score * scale, -float("inf"))
            new_best = tl.maximum(best, tl.max(score, axis=1))
            shrink = tl.exp2(best - new_best)
            p = tl.exp2(score - new_best[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(latent.dtype), latent, acc * shrink[:, None], input_precision=PRECISION)
            best = new_best
        tl.store(partial + own[:, None] * RANK + d[None, :], acc, mask=heads & (d < RANK)[None, :])
    tl.store(partial_max + own, best, mask=head < HEADS)
    tl.store(partial_sum + own, total, mask=head < HEADS)


@triton.jit
def latent_values(
    partial,  # see decode_latents
    partial_max,
    partial_sum,
    kv_b,  # [HEADS, NOPE + VALUE, RANK]
    out,  # [M, HEADS, VALUE]
    amax,  # [1] float32, raised to the largest |out|, for HAS_AMAX
    count,  # M
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,  # values that a program computes
    BLOCK_RANK: tl.constexpr,  # columns of the latent at a time
    ROWS: tl.constexpr,  # rows of a program
    HAS_AMAX: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINE: tl.constexpr,  # elements in 128 bytes
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make values of what each split of ROWS rows and one head attended to, and merge the splits."""
    begin(PDL)
    head = tl.program_id(1)
    v = tl.program_id(2) * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    d = tl.arange(0, BLOCK_RANK)
    each = (tl.program_id(0) * (ROWS * SPLITS) + tl.arange(0, ROWS * SPLITS)).to(tl.int64)  # row by row, its splits
    there = each < count * SPLITS
    at = each * HEADS + head
    weight_row = (head * (NOPE + VALUE) + NOPE + v)[:, None] * RANK
    if PREFETCH:
        for start in range(0, RANK, BLOCK_RANK):
            column = tl.minimum(start + tl.arange(0, BLOCK_RANK // LINE) * LINE, RANK - 1)
            prefetch(kv_b + tl.minimum(weight_row, ((head + 1) * (NOPE + VALUE) - 1) * RANK) + column[None, :])
    wait(PDL)
    maxima = tl.load(partial_max + at, mask=there, other=-float("inf"))
    sums = tl.load(partial_sum + at, mask=there, other=0.0)
    there = there & (sums > 0.0)
    inverse = 1.0 / tl.where(there, sums, 1.0)
    acc = tl.zeros([ROWS * SPLITS, BLOCK_VALUE], tl.float32)
    for start in range(0, RANK, BLOCK_RANK):
        column = start + d
        weight_mask = (v < VALUE)[:, None] & (column < RANK)[None, :]
        weight = tl.load(kv_b + weight_row + column[None, :], mask=weight_mask, other=0.0)
        mask = there[:, None] & (column < RANK)[None, :]
        latent = tl.load(partial + at[:, None] * RANK + column[None, :], mask=mask, other=0.0) * inverse[:, None]
        acc = tl.dot(latent.to(weight.dtype), tl.trans(weight), acc, input_precision=PRECISION)
    maxima = tl.reshape(maxima, [ROWS, SPLITS])
    best = tl.max(maxima, axis=1)
    best = tl.where(best == -float("inf"), 0.0, best)  # a row without a token
    shares = tl.exp2(maxima - best[:, None]) * tl.reshape(sums, [ROWS, SPLITS])
    total = tl.sum(shares, axis=1)
    shares /= tl.where(total > 0.0, total, 1.0)[:, None]
    acc = tl.reshape(acc * tl.reshape(shares, [ROWS * SPLITS])[:, None], [ROWS, SPLITS, BLOCK_VALUE])
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    to = out + (row * HEADS + head)[:, None] * VALUE + v[None, :]
    values = tl.sum(acc, axis=1)
    mask = (row < count)[:, None] & (v < VALUE)[None, :]
    tl.store(to, values.to(out.dtype.element_ty), mask=mask)
    if HAS_AMAX:
        tl.atomic_max(amax, tl.max(tl.where(mask, tl.abs(values), 0.0)))


@triton.jit
def prefill_latents(
    queries,  # [M, HEADS, RANK + ROPE]
    entries,
    table,
    tiles,  # [num_tiles, 4] int32: slot, position of the first query, its row in queries, how many; 0 of these: none
    out,  # [M, HEADS, RANK]
    extent,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,  # >= RANK, a power of two, at least 16
    BLOCK_ROPE: tl.constexpr,  # >= ROPE, likewise
    BM: tl.constexpr,
    BN: tl.constexpr,
    SHARES: tl.constexpr,  # programs that share a tile's queries
    PAGE: tl.constexpr,  # see cache_row; a multiple of BN
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM queries of one chunk and head attend to their slot's entries up to their own positions."""
    begin(PDL)
    wait(PDL)
    ENTRY: tl.constexpr = RANK + ROPE
    head, share, tile = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES, tl.program_id(1)
    slot = tl.load(tiles + 4 * tile).to(tl.int64)
    start = tl.load(tiles + 4 * tile + 1) + share * BM
    row = tl.load(tiles + 4 * tile + 2).to(tl.int64) + share * BM
    count = tl.load(tiles + 4 * tile + 3) - share * BM
    if count > 0:
        m, n = tl.arange(0, BM), tl.arange(0, BN)
        d, r = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
        there = (m < count)[:, None]
        at = queries + ((row + m)[:, None] * HEADS + head) * ENTRY
        q_latent = tl.load(at + d[None, :], mask=there & (d < RANK)[None, :], other=0.0)
        q_rotary = tl.load(at + RANK + r[None, :], mask=there & (r < ROPE)[None, :], other=0.0)
        best = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BLOCK_RANK], tl.float32)
        end = start + tl.minimum(count, BM)
        for first in range(0, end, BN):
            inside = (first + n < end)[:, None]
            rows = (cache_row(table, slot, 0, first, True, extent, 1, PAGE) + n)[:, None] * ENTRY
            latent = tl.load(entries + rows + d[None, :], mask=inside & (d < RANK)[None, :], other=0.0)
            rotary = tl.load(entries + rows + RANK + r[None, :], mask=inside & (r < ROPE)[None, :], other=0.0)
            score = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
            score = tl.dot(q_rotary, tl.trans(rotary), score, input_precision=PRECISION)
            score = tl.where((first + n)[None, :] <= (start + m)[:, None], score, -float("inf"))
            p, best, total, shrink = running_softmax(score, best, total, scale)
            acc = tl.dot(p.to(latent.dtype), latent, acc * shrink[:, None], input_precision=PRECISION)
        acc /= total[:, None]
        to = out + ((row + m)[:, None] * HEADS + head) * RANK + d[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=there & (d < RANK)[None, :])


@triton.jit
def prefill_heads(
    queries,  # [M, HEADS, RANK + ROPE], of which the rotary channels are read
    plain,  # [M, HEADS, NOPE]
    made,  # [M, HEADS, NOPE + VALUE], each head's keys and values, made of the rows' latents
    packed,  # [M, RANK + ROPE], the rows' entries
    tiles,  # see prefill_latents; each chunk begins its text
    out,  # [M, HEADS, VALUE]
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,  # >= NOPE, a power of two, at least 16
    BLOCK_ROPE: tl.constexpr,  # >= ROPE, likewise
    BLOCK_VALUE: tl.constexpr,  # >= VALUE, likewise
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM queries of one chunk and head attend to the chunk's own keys up to their own positions."""
    begin(PDL)
    wait(PDL)
    ENTRY: tl.constexpr = RANK + ROPE
    head, tile = tl.program_id(0), tl.program_id(1)
    start = tl.load(tiles + 4 * tile + 1)
    row = tl.load(tiles + 4 * tile + 2).to(tl.int64)
    count = tl.load(tiles + 4 * tile + 3)
    if count > 0:
        m, n = tl.arange(0, BM), tl.arange(0, BN)
        d, r, v = tl.arange(0, BLOCK_NOPE), tl.arange(0, BLOCK_ROPE), tl.arange(0, BLOCK_VALUE)
        there = (m < count)[:, None]
        at = (row + m)[:, None] * HEADS + head
        q_plain = tl.load(plain + at * NOPE + d[None, :], mask=there & (d < NOPE)[None, :], other=0.0)
        q_rotary = tl.load(queries + at * ENTRY + RANK + r[None, :], mask=there & (r < ROPE)[None, :], other=0.0)
        best = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BLOCK_VALUE], tl.float32)
        chunk = row - start  # the row of the text's first token
        end = start + count
        whole = (start + 1) // BN * BN  # every query sees all positions before this one
        for first in range(0, whole, BN):
            best, total, acc = _attend_heads(
                q_plain, q_rotary, made, packed, chunk + first + n, first + n, start + m, end, head, d, r, v,
                best, total, acc, scale, HEADS, NOPE, ROPE, VALUE, RANK, False, PRECISION,
            )  # fmt: skip
        for first in range(whole, end, BN):
            best, total, acc = _attend_heads(
                q_plain, q_rotary, made, packed, chunk + first + n, first + n, start + m, end, head, d, r, v,
                best, total, acc, scale, HEADS, NOPE, ROPE, VALUE, RANK, True, PRECISION,
            )  # fmt: skip
        acc /= total[:, None]
        tl.store(out + at * VALUE + v[None, :], acc.to(out.dtype.element_ty), mask=there & (v < VALUE)[None, :])


@triton.jit
def _attend_heads(
    q_plain, q_rotary, made, packed, rows, keys, positions, end, head, d, r, v, best, total, acc, scale,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a head's keys and values, of the positions `keys` at `rows`, into the running softmax."""
    plain_mask, rotary_mask, value_mask = (d < NOPE)[None, :], (r < ROPE)[None, :], (v < VALUE)[None, :]
    if MASKED:
        inside = (keys < end)[:, None]
        plain_mask, rotary_mask, value_mask = plain_mask & inside, rotary_mask & inside, value_mask & inside
    at = made + (rows[:, None] * HEADS + head) * (NOPE + VALUE)
    k_plain = tl.load(at + d[None, :], mask=plain_mask, other=0.0)
    k_rotary = tl.load(packed + rows[:, None] * (RANK + ROPE) + RANK + r[None, :], mask=rotary_mask, other=0.0)
    score = tl.dot(q_plain, tl.trans(k_plain), input_precision=PRECISION)
    score = tl.dot(q_rotary, tl.trans(k_rotary), score, input_precision=PRECISION)
    if MASKED:
        score = tl.where(keys[None, :] <= positions[:, None], score, -float("inf"))
    p, best, total, shrink = running_softmax(score, best, total, scale)
    value = tl.load(at + NOPE + v[None, :], mask=value_mask, other=0.0)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return best, total, acc
