"""The router of a mixture of experts: logits and choice in float32, then the tokens' order by expert.

Every buffer has its largest size and the host reads nothing, so that the steps can be captured in a CUDA graph. No
atomics: the order is that of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import (
    begin,
    sum_of_parts,
    to_codes,
    token_scale,
    wait,
)

TINY = tl.constexpr(1e-20)  # added to a sum that divides


@triton.jit
def router_logits(
    x,  # [M, K], the network's dtype
    weight,  # [E, K] float32
    out,  # [NUM_PARTS, M, E] float32
    M,
    E: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[s] = x @ weight.T over the s-th part of K."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    k = tl.arange(0, BK)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    first, last = part * STEPS // NUM_PARTS, (part + 1) * STEPS // NUM_PARTS
    begin(PDL)
    wait(PDL)
    # Rows past the end read the last row; their products are not stored.
    w_pointers = weight + tl.minimum(e, E - 1)[None, :] * K + k[:, None]
    x_pointers = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros([BM, BE], tl.float32)
    for step in range(first, last):
        inside = step * BK + k < K
        w = tl.load(w_pointers + step * BK, mask=inside[:, None], other=0.0)
        v = tl.load(x_pointers + step * BK, mask=inside[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(v, w, acc, input_precision=PRECISION)
    pointers = out + (part * M + m.to(tl.int64))[:, None] * E + e[None, :]
    tl.store(pointers, acc, mask=(m < M)[:, None] & (e < E)[None, :])


@triton.jit
def _in_best_groups(
    ranked,
    is_expert,
    TOP2: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Which experts [BLOCK_GROUPS * BLOCK_SIZE] are in the best groups: by a group's best or its two best."""
    groups = tl.reshape(tl.where(is_expert, ranked, -float("inf")), [BLOCK_GROUPS, BLOCK_SIZE])
    score = tl.max(groups, axis=1)
    if TOP2:
        place = tl.argmax(groups, axis=1)
        others = tl.where(tl.arange(0, BLOCK_SIZE)[None, :] == place[:, None], -float("inf"), groups)
        score += tl.max(others, axis=1)
    group = tl.arange(0, BLOCK_GROUPS)
    is_best = group < 0
    for _ in tl.static_range(TOPK_GROUP):
        best = tl.argmax(score, axis=0)
        is_best = is_best | (group == best)
        score = tl.where(group == best, -float("inf"), score)
    everywhere = tl.broadcast_to(is_best.to(tl.int32)[:, None], [BLOCK_GROUPS, BLOCK_SIZE])
    return tl.reshape(everywhere, [BLOCK_GROUPS * BLOCK_SIZE]) != 0


@triton.jit
def _lanes(E: tl.constexpr, GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The expert of each lane, group by group, and whether there is one."""
    SIZE: tl.constexpr = E // GROUPS
    lane = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)
    expert = lane // BLOCK_SIZE * SIZE + lane % BLOCK_SIZE
    return expert, (lane // BLOCK_SIZE < GROUPS) & (lane % BLOCK_SIZE < SIZE)


@triton.jit
def _choose(
    logit,
    m,
    bias,
    positions,
    chosen,
    weights,
    order,
    tiles,
    scale,
    first,
    E: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    ALWAYS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIGMOID: tl.constexpr,
    CHOICE: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ALONE: tl.constexpr,
):
    """The experts of row m and their weights, from its logits in lanes; see choose_experts."""
    SIZE: tl.constexpr = E // GROUPS
    lane = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)
    expert, is_expert = _lanes(E, GROUPS, BLOCK_GROUPS, BLOCK_SIZE)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        logit = tl.where(is_expert, logit, -float("inf"))
        score = tl.exp(logit - tl.max(logit))
        score = score / tl.sum(score)
    ranked = score
    if CHOICE == "group_top2":
        ranked += tl.load(bias + expert, mask=is_expert, other=0.0)
        is_best = _in_best_groups(ranked, is_expert, True, TOPK_GROUP, BLOCK_GROUPS, BLOCK_SIZE)
        ranked = tl.where(is_best, ranked, -float("inf"))
    if CHOICE == "group_maximum":
        is_best = _in_best_groups(ranked, is_expert, False, TOPK_GROUP, BLOCK_GROUPS, BLOCK_SIZE)
        ranked = tl.where(is_best, ranked, 0.0)
    ranked = tl.where(is_expert, ranked, -float("inf"))
    place = tl.arange(0, BLOCK_K)
    experts, own = E - TOP_K + place, tl.zeros([BLOCK_K], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(ranked, axis=0)
        number = best // BLOCK_SIZE * SIZE + best % BLOCK_SIZE
        experts = tl.where(place == i, tl.minimum(number, E - 1), experts)  # with NaN it may be past the end
        own = tl.where(place == i, tl.sum(tl.where(lane == best, score, 0.0)), own)
        ranked = tl.where(lane == best, -float("inf"), ranked)
    if NORMALISED:
        own = own / (tl.sum(own) + TINY)
    own = tl.where(place < TOP_K, own * scale, 1.0)
    is_own = (experts >= first) & (experts < first + OWN)
    experts = tl.where(place < TOP_K, tl.where(is_own, experts - first, OWN + ALWAYS), experts - E + OWN)
    if HAS_POSITIONS:
        experts = tl.where(tl.load(positions + m) < 0, OWN + ALWAYS, experts)
    COUNT: tl.constexpr = TOP_K + ALWAYS
    tl.store(chosen + m * COUNT + place, experts, mask=place < COUNT)
    tl.store(weights + m * COUNT + place, own, mask=place < COUNT)
    if ALONE:
        tl.store(order + place, place, mask=place < COUNT)
        tl.store(tiles + place * 3, tl.where(experts < OWN + ALWAYS, experts, -1), mask=place < COUNT)
        tl.store(tiles + place * 3 + 1, place, mask=place < COUNT)
        tl.store(tiles + place * 3 + 2, 1, mask=place < COUNT)


@triton.jit
def choose_experts(
    logits,  # [NUM_PARTS, M, E] float32
    bias,  # [E] float32, for CHOICE "group_top2"
    positions,  # [M] int64; negative: the row has no token, and chooses none
    chosen,  # [M, TOP_K + ALWAYS] int32, the best first, then experts OWN …; OWN + ALWAYS: none of this rank's
    weights,  # [M, TOP_K + ALWAYS] float32
    order,  # with ALONE, of the only row: see order_by_expert; its pairs are a tile each
    tiles,
    part_stride,
    scale,
    first,  # this rank's experts are numbered from `first` on in the router, from 0 on in `chosen`
    E: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    ALWAYS: tl.constexpr,  # experts that every token gets, with the weight 1
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIGMOID: tl.constexpr,
    CHOICE: tl.constexpr,  # as ExpertOptions.choice
    NORMALISED: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each token's experts and their weights; of equal ones the first."""
    begin(PDL)
    m = tl.program_id(0).to(tl.int64)
    expert, is_expert = _lanes(E, GROUPS, BLOCK_GROUPS, BLOCK_SIZE)
    wait(PDL)
    logit = sum_of_parts(logits, m * E + expert, is_expert, part_stride, NUM_PARTS)
    _choose(
        logit, m, bias, positions, chosen, weights, order, tiles, scale, first, E, OWN, TOP_K, ALWAYS, GROUPS,
        TOPK_GROUP, SIGMOID, CHOICE, NORMALISED, BLOCK_GROUPS, BLOCK_SIZE, BLOCK_K, HAS_POSITIONS, ALONE,
    )  # fmt: skip


@triton.jit
def norm_router(
    hidden,  # [K] float32, the residual stream of the only row
    norm_weight,  # [K]
    weight,  # [E, K] float32
    codes,  # [K], the norm in E4M3, for FP8
    codes_scale,  # [1] float32
    plain,  # [K], the norm in the network's dtype, which the router reads
    logits,  # [E] float32, scratch
    finished,  # [1] int32, 0 before and after
    zero,  # [1] float32, set to 0
    amax,  # [TOP_K + ALWAYS] float32, likewise
    bias,  # from here on see choose_experts
    positions,
    chosen,
    weights,
    eps,
    scale,
    first,
    columns,  # K, of which the compiler knows nothing: see gemv.py
    K: tl.constexpr,
    BK: tl.constexpr,  # >= K
    BE: tl.constexpr,  # experts of a program
    FP8: tl.constexpr,
    E: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    ALWAYS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIGMOID: tl.constexpr,
    CHOICE: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The norm of one row and its experts in one kernel: the program that finishes last chooses."""
    k = tl.arange(0, BK)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    w = tl.load(weight + e[:, None] * K + k[None, :], mask=(e < E)[:, None] & (k < K)[None, :], other=0.0)
    norm = tl.load(norm_weight + k, mask=k < columns, other=0.0).to(tl.float32)
    begin(PDL)
    wait(PDL)
    x = tl.load(hidden + k, mask=k < columns, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x) / K + eps) * norm
    rounded = x.to(plain.dtype.element_ty)
    tl.store(logits + e, tl.sum(w * rounded.to(tl.float32)[None, :], axis=1), mask=e < E)
    if tl.program_id(0) == 0:
        tl.store(plain + k, rounded, mask=k < K)
        if FP8:
            own_scale = token_scale(tl.max(tl.abs(x)))
            tl.store(codes + k, to_codes(x, own_scale), mask=k < K)
            tl.store(codes_scale, own_scale)
        tl.store(zero, 0.0)
        pair = tl.arange(0, BLOCK_K)
        tl.store(amax + pair, tl.zeros([BLOCK_K], tl.float32), mask=pair < TOP_K + ALWAYS)
    tl.debug_barrier()  # all threads' stores come before the one thread's atomic
    if tl.atomic_add(finished, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(finished, 0)
        expert, is_expert = _lanes(E, GROUPS, BLOCK_GROUPS, BLOCK_SIZE)
        logit = tl.load(logits + expert, mask=is_expert, other=0.0, cache_modifier=".cg")
        row = tl.program_id(0).to(tl.int64) * 0
        # The kernels of a single row need no tiles.
        _choose(
            logit, row, bias, positions, chosen, weights, chosen, chosen, scale, first, E, OWN, TOP_K, ALWAYS, GROUPS,
            TOPK_GROUP, SIGMOID, CHOICE, NORMALISED, BLOCK_GROUPS, BLOCK_SIZE, BLOCK_K, HAS_POSITIONS, False,
        )  # fmt: skip


@triton.jit
def order_by_expert(
    chosen,  # [N] int32: the expert of each pair of a token and one of its experts; E: none
    order,  # [N] int32: the pairs of expert 0, then those of expert 1, …
    tiles,  # [MAX_TILES, 3] int32: a tile's expert, −1 for no tile; the first of its pairs in `order`; how many
    N,
    MAX_TILES,
    E: tl.constexpr,
    BM: tl.constexpr,  # most pairs of a tile
    COMPACT: tl.constexpr,  # the tiles are without gaps; for few pairs
    BINS: tl.constexpr,  # > E, a power of two
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e puts the pairs of expert e in their places and writes its tiles, and the gap behind them."""
    begin(PDL)
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    wait(PDL)
    if COMPACT:
        bin = tl.arange(0, BINS)
        counts = tl.zeros([BINS], tl.int32)
        for first in range(0, N, BLOCK):
            counts += tl.histogram(tl.load(chosen + first + lane, mask=first + lane < N, other=E), BINS)
        counts = tl.where(bin < E, counts, 0)
        start = tl.sum(tl.where(bin < expert, counts, 0))
        count = tl.sum(tl.where(bin == expert, counts, 0))
        needed = (counts + BM - 1) // BM
        first_tile = tl.sum(tl.where(bin < expert, needed, 0))
        next_tile = first_tile + (count + BM - 1) // BM
    else:
        # An expert's first tile is where it is if those before it have gaps of at most one tile each.
        before, own = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        for first in range(0, N, BLOCK):
            of_pair = tl.load(chosen + first + lane, mask=first + lane < N, other=E)
            before += (of_pair < expert).to(tl.int32)
            own += (of_pair == expert).to(tl.int32)
        start, count = tl.sum(before), tl.sum(own)
        first_tile = start // BM + expert
        next_tile = (start + count) // BM + expert + 1
    if expert == E - 1:
        next_tile = MAX_TILES
    for tile in range(first_tile, next_tile, BLOCK):
        pointers = tiles + (tile + lane) * 3
        is_slot = tile + lane < next_tile
        done = (tile + lane - first_tile) * BM
        tl.store(pointers, tl.where(done < count, expert, -1), mask=is_slot)
        tl.store(pointers + 1, start + done, mask=is_slot)
        tl.store(pointers + 2, tl.minimum(count - done, BM), mask=is_slot)
    if count > 0:
        place = start - 1
        for first in range(0, N, BLOCK):
            is_own = (tl.load(chosen + first + lane, mask=first + lane < N, other=E) == expert).to(tl.int32)
            tl.store(order + place + tl.cumsum(is_own, axis=0), first + lane, mask=is_own != 0)
            place += tl.sum(is_own)
