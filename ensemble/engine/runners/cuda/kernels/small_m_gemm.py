"""Matrix products of a few tokens (small M) on the tensor cores; memory bandwidth still limits them.

The weight rows are the M dimension of the tensor-core product (at least 64, as Hopper's wgmma needs), the tokens its N
dimension. The inner dimension is split over `NUM_PARTS` programs (split-K), so that every multiprocessor has work. The
next kernel adds the parts in order, without atomics: results are deterministic, and a token's sums don't depend on the
number of other tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import begin, prefetch, wait


@triton.jit
def small_m_gemm(
    x,  # [M, K] codes, or the network's dtype
    x_scale,  # [M] float32
    weight,  # [N, K]
    weight_scale,  # [N] float32, or [N, BLOCKS]
    out,  # [NUM_PARTS, M, N]
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKS: tl.constexpr,  # scales of a weight row, each for BK columns; 0: it has one
    NUM_PARTS: tl.constexpr,
    FP8: tl.constexpr,
    PREFETCH: tl.constexpr,  # the weights before waiting; worth it where there are few rows
    LINE: tl.constexpr,  # elements of the weights in 128 bytes
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[s] = x @ weight.T over the s-th part of K."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # grid axis 0: neighbouring programs read the same weights
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    k = tl.arange(0, BK)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    first, last = part * STEPS // NUM_PARTS, (part + 1) * STEPS // NUM_PARTS
    begin(PDL)
    if PREFETCH:
        line = tl.arange(0, BK // LINE) * LINE
        for step in range(first, last):
            column = tl.minimum(step * BK + line, K - 1)
            prefetch(weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + column[None, :])
    wait(PDL)
    # Rows past the end read the last row; their products are not stored.
    w_pointers = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    x_pointers = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(first, last):
        if K % BK:
            inside = step * BK + k < K
            w = tl.load(w_pointers + step * BK, mask=inside[None, :], other=0.0)
            v = tl.load(x_pointers + step * BK, mask=inside[:, None], other=0.0)
        else:
            w = tl.load(w_pointers + step * BK)
            v = tl.load(x_pointers + step * BK)
        # Tensor cores sum E4M3 products in fewer bits than float32; each step's sum is added in float32.
        if BLOCKS:
            scale = tl.load(weight_scale + tl.minimum(n, N - 1) * BLOCKS + step)
            acc += tl.dot(w, v, input_precision=PRECISION) * scale[:, None]
        else:
            acc = tl.dot(w, v, acc, max_num_imprecise_acc=BK, input_precision=PRECISION)
    if FP8:
        if not BLOCKS:
            acc *= tl.load(weight_scale + n, mask=n < N, other=0.0)[:, None]
        acc *= tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
    pointers = out + (part * M + m.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(pointers, tl.trans(acc).to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
