"""One token times a matrix: the kernels of decoding at batch 1, where reading the weights is all that costs.

A program holds `BN` rows of the matrix at a time, or goes through tiles of them with several on their way (`STAGES`). A
program that has one tile asks for it before it waits for its predecessor. The activations are normed, scaled and rounded by
every program for itself: cheaper than a kernel that does it once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ensemble.engine.runners.cuda.common import begin, prefetch, to_codes, token_scale, wait

VECTOR = tl.constexpr(16)  # elements of a row that one thread holds side by side


@triton.jit
def _normed(hidden, norm_weight, k, mask, eps, K: tl.constexpr, FP8: tl.constexpr):
    """RMS norm of the residual stream; for FP8 rounded to codes, and the token's scale."""
    x = tl.load(hidden + k, mask=mask, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x) / K + eps) * norm_weight
    scale = 1.0
    if FP8:
        scale = token_scale(tl.max(tl.abs(x)))
        x = to_codes(x, scale).to(tl.float32)
    return x, scale


@triton.jit
def _rows(weight, first, k, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """Weight rows first … first + BN − 1 as [BN, BK]."""
    n = first + tl.arange(0, BN)
    mask = (n < N)[:, None] & (k < K)[None, :]
    return tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _scaled(w, x, n, scale, weight_scale, bias, N: tl.constexpr, FP8: tl.constexpr, HAS_BIAS: tl.constexpr):
    """w @ x of the rows n, scaled, plus their bias."""
    y = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    if FP8:
        y *= tl.load(weight_scale + n, mask=n < N, other=0.0) * scale
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0)
    return y


@triton.jit
def norm_gemv(
    hidden,  # [K] float32, the residual stream
    norm_weight,  # [K]
    weight,  # [N, K]
    weight_scale,  # [N] float32
    bias,  # [N] float32
    out,  # [N] float32
    zero,  # [1] float32, set to 0: a later kernel raises it to its largest magnitude
    ahead,  # weights of the next kernel, for L2
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # >= K
    STAGES: tl.constexpr,  # 0: one tile a program
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = norm(hidden) @ weight.T + bias."""
    k = tl.arange(0, BK)
    tile = tl.program_id(0)
    if STAGES == 0:
        w = _rows(weight, tile * BN, k, N, K, BN)
    norm = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
    begin(PDL)
    wait(PDL)
    x, scale = _normed(hidden, norm, k, k < K, eps, K, FP8)
    prefetch(ahead, AHEAD, THREADS)
    if tile == 0:
        tl.store(zero, 0.0)
    if STAGES == 0:
        n = tile * BN + tl.arange(0, BN)
        tl.store(out + n, _scaled(w, x, n, scale, weight_scale, bias, N, FP8, HAS_BIAS), mask=n < N)
    else:
        for first in tl.range(tile * BN, N, BN * tl.num_programs(0), num_stages=STAGES):
            w = _rows(weight, first, k, N, K, BN)
            n = first + tl.arange(0, BN)
            tl.store(out + n, _scaled(w, x, n, scale, weight_scale, bias, N, FP8, HAS_BIAS), mask=n < N)


@triton.jit
def norm_gemv_silu(
    hidden,  # [K] float32
    norm_weight,  # [K]
    weight,  # [2 N, K]: gate, then up
    weight_scale,  # [2 N] float32
    bias,  # [2 N] float32
    out,  # [N] float32
    amax,  # [1] float32, raised to the largest |out|
    zero,  # [1] float32, set to 0
    ahead,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # >= K
    STAGES: tl.constexpr,  # 0: one tile a program
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = silu(gate) * up, where [gate, up] = norm(hidden) @ weight.T + bias."""
    k = tl.arange(0, BK)
    tile = tl.program_id(0)
    up_weight = weight + N * K
    if STAGES == 0:
        gate_w = _rows(weight, tile * BN, k, N, K, BN)
        up_w = _rows(up_weight, tile * BN, k, N, K, BN)
    norm = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
    begin(PDL)
    wait(PDL)
    x, scale = _normed(hidden, norm, k, k < K, eps, K, FP8)
    prefetch(ahead, AHEAD, THREADS)
    if tile == 0:
        tl.store(zero, 0.0)
    if STAGES == 0:
        n = tile * BN + tl.arange(0, BN)
        gate = _scaled(gate_w, x, n, scale, weight_scale, bias, N, FP8, HAS_BIAS)
        up = _scaled(up_w, x, n, scale, weight_scale + N, bias + N, N, FP8, HAS_BIAS)
        y = gate * tl.sigmoid(gate) * up
        tl.store(out + n, y, mask=n < N)
        largest = tl.max(tl.where(n < N, tl.abs(y), 0.0))
    else:
        largest = 0.0
        for first in tl.range(tile * BN, N, BN * tl.num_programs(0), num_stages=STAGES):
            gate_w = _rows(weight, first, k, N, K, BN)
            up_w = _rows(up_weight, first, k, N, K, BN)
            n = first + tl.arange(0, BN)
            gate = _scaled(gate_w, x, n, scale, weight_scale, bias, N, FP8, HAS_BIAS)
            up = _scaled(up_w, x, n, scale, weight_scale + N, bias + N, N, FP8, HAS_BIAS)
            y = gate * tl.sigmoid(gate) * up
            tl.store(out + n, y, mask=n < N)
            largest = tl.maximum(largest, tl.max(tl.where(n < N, tl.abs(y), 0.0)))
    tl.atomic_max(amax, largest)


@triton.jit
def residual_gemv(
    x,  # [K] float32
    amax,  # [1] float32, the largest |x|
    weight,  # [N, K]
    weight_scale,  # [N] float32
    bias,  # [N] float32
    hidden,  # [N] float32, added to
    ahead,
    ahead_more,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,  # 0: the next columns are asked for by hand, the first of them before waiting
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden += x @ weight.T + bias, BN rows a program, BK columns at a time."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    row_mask = (n < N)[:, None]
    pointers = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    if STAGES == 0:
        w = tl.load(pointers, mask=row_mask & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    begin(PDL)
    wait(PDL)
    prefetch(ahead, AHEAD, THREADS)
    prefetch(ahead_more, AHEAD, THREADS)
    scale = 1.0
    if FP8:
        scale = token_scale(tl.load(amax))
    acc = tl.zeros([BN, BK // VECTOR], tl.float32)
    if STAGES == 0:
        for first in range(0, K, BK):
            if BK < K:
                w_next = tl.load(
                    pointers + first + BK, mask=row_mask & (first + BK + k < K)[None, :], other=0.0,
                    eviction_policy="evict_first",
                )
            acc += _products(w, x, first + k, scale, K, BN, BK, FP8)
            if BK < K:
                w = w_next
    else:
        for first in tl.range(0, K, BK, num_stages=STAGES):
            w = tl.load(
                pointers + first, mask=row_mask & (first + k < K)[None, :], other=0.0, eviction_policy="evict_first"
            )
            acc += _products(w, x, first + k, scale, K, BN, BK, FP8)
    y = tl.sum(acc, axis=1)
    if FP8:
        y *= tl.load(weight_scale + n, mask=n < N, other=0.0) * scale
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0)
    tl.store(hidden + n, tl.load(hidden + n, mask=n < N, other=0.0) + y, mask=n < N)


@triton.jit
def _products(w, x, k, scale, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FP8: tl.constexpr):
    """w * x, added up within each thread: [BN, BK / VECTOR]."""
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if FP8:
        value = to_codes(value, scale).to(tl.float32)
    return tl.sum(tl.reshape(w.to(tl.float32) * value[None, :], [BN, BK // VECTOR, VECTOR]), axis=2)
