"""Matrix products of each expert with the tokens that chose it.

As in small_m_gemm.py the weight rows are the M dimension of the tensor-core product and the tokens its N dimension:
few tokens read each chosen expert's weights once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import begin, to_codes, token_scale, wait

VECTOR = tl.constexpr(16)  # neighbouring elements of a row in one thread


@triton.jit
def grouped_gemm(
    x,  # with GATED [M, K], of tokens; else [M COUNT, K], of pairs; codes, or the network's dtype
    x_scale,  # [M] or [M COUNT] float32
    weight,  # [E, ROWS, K]; ROWS is OUT, or with GATED 2 OUT: gate, then up
    weight_scale,  # [E, ROWS] float32, or [E, ROWS, BLOCKS]
    tiles,  # see order_by_expert
    order,
    pair_weights,  # [M COUNT] float32
    out,  # with GATED [M COUNT, OUT]; else [COUNT, M, OUT]: parts whose sum is a token's output
    M,
    OUT: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,  # experts of a token
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKS: tl.constexpr,  # scales of a weight row, each for BK columns; 0: it has one
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[pair] = x @ weight[its expert].T, times the pair's weight; with GATED silu(gate) * up of it."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)  # grid axis 0: neighbouring programs read the same tokens
    tile = tiles + tl.program_id(1) * 3
    k = tl.arange(0, BK)
    ROWS: tl.constexpr = 2 * OUT if GATED else OUT
    begin(PDL)
    wait(PDL)
    expert = tl.load(tile).to(tl.int64)
    if expert < 0:
        return
    start, count = tl.load(tile + 1), tl.load(tile + 2)
    m = tl.arange(0, BM)
    is_pair = m < count
    # Rows past the end read the last row; their products are not stored.
    pair = tl.load(order + start + tl.minimum(m, count - 1)).to(tl.int64)
    row = pair // COUNT if GATED else pair
    w_pointers = weight + (expert * ROWS + tl.minimum(n, OUT - 1))[:, None] * K + k[None, :]
    x_pointers = x + row[None, :] * K + k[:, None]
    MOST_IMPRECISE: tl.constexpr = None if FAST else BK
    acc = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32)
    scales = weight_scale + (expert * ROWS + tl.minimum(n, OUT - 1)) * (BLOCKS if BLOCKS else 1)
    for step in range(0, (K + BK - 1) // BK):
        # Tensor cores sum E4M3 products in fewer bits than float32; unless FAST each step's sum is added in float32.
        if BLOCKS:
            inside = step * BK + k < K
            v = tl.load(x_pointers + step * BK, mask=inside[:, None], other=0.0)
            w = tl.load(w_pointers + step * BK, mask=inside[None, :], other=0.0)
            acc += tl.dot(w, v, input_precision=PRECISION) * tl.load(scales + step)[:, None]
            if GATED:
                w = tl.load(w_pointers + OUT * K + step * BK, mask=inside[None, :], other=0.0)
                up += tl.dot(w, v, input_precision=PRECISION) * tl.load(scales + OUT * BLOCKS + step)[:, None]
        elif K % BK:
            inside = step * BK + k < K
            w = tl.load(w_pointers + step * BK, mask=inside[None, :], other=0.0)
            v = tl.load(x_pointers + step * BK, mask=inside[:, None], other=0.0)
            acc = tl.dot(w, v, acc, max_num_imprecise_acc=MOST_IMPRECISE, input_precision=PRECISION)
            if GATED:
                w = tl.load(w_pointers + OUT * K + step * BK, mask=inside[None, :], other=0.0)
                up = tl.dot(w, v, up, max_num_imprecise_acc=MOST_IMPRECISE, input_precision=PRECISION)
        else:
            w = tl.load(w_pointers + step * BK)
            v = tl.load(x_pointers + step * BK)
            acc = tl.dot(w, v, acc, max_num_imprecise_acc=MOST_IMPRECISE, input_precision=PRECISION)
            if GATED:
                w = tl.load(w_pointers + OUT * K + step * BK)
                up = tl.dot(w, v, up, max_num_imprecise_acc=MOST_IMPRECISE, input_precision=PRECISION)
    if FP8:
        of_token = tl.load(x_scale + row)[None, :]
        if BLOCKS:
            acc *= of_token
            up *= of_token
        else:
            acc *= tl.load(scales)[:, None] * of_token
            if GATED:
                up *= tl.load(scales + OUT)[:, None] * of_token
    target = pair
    if GATED:
        acc = acc * tl.sigmoid(acc) * up
    else:
        acc *= tl.load(pair_weights + pair)[None, :]
        target = pair % COUNT * M + pair // COUNT
    pointers = out + target[:, None] * OUT + n[None, :]
    tl.store(pointers, tl.trans(acc).to(out.dtype.element_ty), mask=is_pair[:, None] & (n < OUT)[None, :])


@triton.jit
def activate_experts(
    x,  # [K], one token's; codes, or the network's dtype
    x_scale,  # [1] float32
    weight,  # [E, 2 OUT, K]: gate, then up
    weight_scale,  # [E, 2 OUT] float32
    chosen,  # [COUNT] int32; E: none
    out,  # [COUNT, OUT], the network's dtype
    amax,  # [COUNT] float32, raised to the largest magnitude of each expert's row
    columns,  # K, of which the compiler knows nothing: see gemv.py
    E: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # >= K
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = silu(gate) * up of x for each chosen expert, BN rows of one of them a program."""
    begin(PDL)
    pair = tl.program_id(1)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    wait(PDL)
    expert = tl.load(chosen + pair).to(tl.int64)
    if expert < E:
        inside = n < OUT
        row = expert * (2 * OUT) + n
        at, mask = weight + row[:, None] * K + k[None, :], inside[:, None] & (k < K)[None, :]
        gate_weight, up_weight = tl.load(at, mask=mask, other=0.0), tl.load(at + OUT * K, mask=mask, other=0.0)
        value = tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)[None, :]
        gate = tl.sum(gate_weight.to(tl.float32) * value, axis=1)
        up = tl.sum(up_weight.to(tl.float32) * value, axis=1)
        if FP8:
            scale = tl.load(x_scale)
            gate *= tl.load(weight_scale + row, mask=inside, other=0.0) * scale
            up *= tl.load(weight_scale + OUT + row, mask=inside, other=0.0) * scale
        y = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        tl.store(out + pair * OUT + n, y, mask=inside)
        tl.atomic_max(amax + pair, tl.max(tl.where(inside, tl.abs(y.to(tl.float32)), 0.0)))


@triton.jit
def add_experts(
    x,  # [COUNT, K], one token's, of each of its experts; the network's dtype
    amax,  # [COUNT] float32: max |x| of each
    weight,  # [E, N, K]
    weight_scale,  # [E, N] float32
    chosen,  # [COUNT] int32; E: none
    pair_weights,  # [COUNT] float32
    hidden,  # [N] float32, added to
    columns,  # K, of which the compiler knows nothing: see gemv.py
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # >= K
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden += Σ pair_weights · x @ weight[expert].T, BN rows a program; x is rounded to codes for FP8."""
    begin(PDL)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    wait(PDL)
    before = tl.load(hidden + n, mask=n < N, other=0.0)
    acc = tl.zeros([BN, BK // VECTOR], tl.float32)
    for pair in tl.range(0, COUNT, num_stages=STAGES):
        expert = tl.load(chosen + pair)
        rows = tl.minimum(expert, E - 1).to(tl.int64) * N + tl.minimum(n, N - 1)
        w = tl.load(weight + rows[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        value = tl.load(x + pair * K + k, mask=k < columns, other=0.0).to(tl.float32)
        factor = tl.load(pair_weights + pair) + tl.zeros([BN], tl.float32)
        if FP8:
            scale = token_scale(tl.load(amax + pair))
            value = to_codes(value, scale).to(tl.float32)
            factor *= tl.load(weight_scale + rows) * scale
        # Each thread sums its own elements; the sum over threads is taken once, after the loop.
        own = tl.sum(tl.reshape(w.to(tl.float32) * value[None, :], [BN, BK // VECTOR, VECTOR]), axis=2)
        acc += tl.where(expert < E, own * factor[:, None], 0.0)  # what no expert computed may be anything
    tl.store(hidden + n, before + tl.sum(acc, axis=1), mask=n < N)
