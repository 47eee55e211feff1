"""Matrix-vector products (GEMV): the kernels of decoding at batch 1, which memory bandwidth limits.

A program multiplies a tile of `BN` weight rows, or loops over several tiles and prefetches the next (`STAGES`). It
loads its first weights, scales and biases before it waits for its predecessor. Every program norms, scales and rounds
the activations itself, which is cheaper than a kernel that does it once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import begin, to_codes, token_scale, wait

# `columns` equals K, but is an argument, so that the compiler doesn't know it. ptxas (CUDA 12.8) miscompiles packing
# two pairs of equal constants into E4M3 codes: if it knows that the columns from K on are zeros, their codes are the
# contents of an arbitrary register, even NaN.
VECTOR = tl.constexpr(16)  # neighbouring elements of a row in one thread


@triton.jit
def _normed(hidden, norm_weight, k, mask, eps, K: tl.constexpr, FP8: tl.constexpr):
    """RMS norm of the residual stream, for FP8 rounded to E4M3 codes, and the token's scale."""
    x = tl.load(hidden + k, mask=mask, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x) / K + eps) * norm_weight
    scale = 1.0
    if FP8:
        scale = token_scale(tl.max(tl.abs(x)))
        x = to_codes(x, scale).to(tl.float32)
    return x, scale


@triton.jit
def _rows(weight, n, k, N: tl.constexpr, K: tl.constexpr):
    """The weight rows n as [BN, BK]. They are read once, so they are evicted from L2 first."""
    mask = (n < N)[:, None] & (k < K)[None, :]
    pointers = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _affine(weight_scale, bias, n, N: tl.constexpr, FP8: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scale and bias of the rows n."""
    scale = tl.full(n.shape, 1.0, tl.float32)
    shift = tl.full(n.shape, 0.0, tl.float32)
    if FP8:
        scale = tl.load(weight_scale + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=n < N, other=0.0)
    return scale, shift


@triton.jit
def _dot(w, x):
    """w [BN, BK] @ x [BK]."""
    return tl.sum(w.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def norm_gemv(
    hidden,  # [K] float32, the residual stream
    norm_weight,  # [K]
    weight,  # [N, K]
    weight_scale,  # [N] float32
    bias,  # [N] float32
    out,  # [N] float32
    zero,  # [1] float32, set to 0: a later kernel raises it to a largest magnitude
    eps,
    columns,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # >= K
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = norm(hidden) @ weight.T + bias, BN rows a program."""
    k = tl.arange(0, BK)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    w = _rows(weight, n, k, N, K)
    row_scale, shift = _affine(weight_scale, bias, n, N, FP8, HAS_BIAS)
    norm = tl.load(norm_weight + k, mask=k < columns, other=0.0).to(tl.float32)
    begin(PDL)
    wait(PDL)
    x, scale = _normed(hidden, norm, k, k < columns, eps, K, FP8)
    tl.store(out + n, _dot(w, x) * (row_scale * scale) + shift, mask=n < N)
    if tl.program_id(0) == 0:
        tl.store(zero, 0.0)


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
    eps,
    columns,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # >= K
    STAGES: tl.constexpr,  # 0: one tile a program
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = silu(gate) * up, where [gate, up] = norm(hidden) @ weight.T + bias."""
    k = tl.arange(0, BK)
    tile = tl.program_id(0)
    up_weight = weight + N * K
    n = tile * BN + tl.arange(0, BN)
    gate_w, up_w = _rows(weight, n, k, N, K), _rows(up_weight, n, k, N, K)
    gate_scale, gate_shift = _affine(weight_scale, bias, n, N, FP8, HAS_BIAS)
    up_scale, up_shift = _affine(weight_scale + N, bias + N, n, N, FP8, HAS_BIAS)
    norm = tl.load(norm_weight + k, mask=k < columns, other=0.0).to(tl.float32)
    begin(PDL)
    wait(PDL)
    x, scale = _normed(hidden, norm, k, k < columns, eps, K, FP8)
    gate = _dot(gate_w, x) * (gate_scale * scale) + gate_shift
    y = gate * tl.sigmoid(gate) * (_dot(up_w, x) * (up_scale * scale) + up_shift)
    tl.store(out + n, y, mask=n < N)
    largest = tl.max(tl.where(n < N, tl.abs(y), 0.0))
    if STAGES:
        step = BN * tl.num_programs(0)
        for first in tl.range(tile * BN + step, N, step, num_stages=STAGES):
            n = first + tl.arange(0, BN)
            gate_w, up_w = _rows(weight, n, k, N, K), _rows(up_weight, n, k, N, K)
            gate_scale, gate_shift = _affine(weight_scale, bias, n, N, FP8, HAS_BIAS)
            up_scale, up_shift = _affine(weight_scale + N, bias + N, n, N, FP8, HAS_BIAS)
            gate = _dot(gate_w, x) * (gate_scale * scale) + gate_shift
            y = gate * tl.sigmoid(gate) * (_dot(up_w, x) * (up_scale * scale) + up_shift)
            tl.store(out + n, y, mask=n < N)
            largest = tl.maximum(largest, tl.max(tl.where(n < N, tl.abs(y), 0.0)))
    tl.atomic_max(amax, largest)
    if tile == 0:
        tl.store(zero, 0.0)


@triton.jit
def residual_gemv(
    x,  # [K] float32
    amax,  # [1] float32, the largest |x|
    weight,  # [N, K]
    weight_scale,  # [N] float32
    bias,  # [N] float32
    hidden,  # [N] float32, added to
    columns,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden += x @ weight.T + bias, BN rows a program, BK columns at a time, while the next BK are loaded."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    w = _rows(weight, n, k, N, K)
    row_scale, shift = _affine(weight_scale, bias, n, N, FP8, HAS_BIAS)
    begin(PDL)
    wait(PDL)
    before = tl.load(hidden + n, mask=n < N, other=0.0)
    scale = 1.0
    if FP8:
        scale = token_scale(tl.load(amax))
    acc = tl.zeros([BN, BK // VECTOR], tl.float32)
    for first in range(0, K, BK):
        if BK < K:
            w_next = _rows(weight, n, first + BK + k, N, K)
        value = tl.load(x + first + k, mask=first + k < columns, other=0.0).to(tl.float32)
        if FP8:
            value = to_codes(value, scale).to(tl.float32)
        # Each thread sums its own elements; the sum over threads is taken once, after the loop.
        acc += tl.sum(tl.reshape(w.to(tl.float32) * value[None, :], [BN, BK // VECTOR, VECTOR]), axis=2)
        if BK < K:
            w = w_next
    tl.store(hidden + n, before + tl.sum(acc, axis=1) * (row_scale * scale) + shift, mask=n < N)
