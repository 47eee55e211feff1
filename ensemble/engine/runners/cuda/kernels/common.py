"""Functions that several kernels call: quantisation to E4M3, and programmatic dependent launch (PDL).

With PDL a kernel starts while its predecessor ends. Each kernel loads its first weights (no kernel writes them), lets
its successor start (`begin`), and then waits for its predecessor (`wait`). Since every kernel waits, the predecessor's
end is the end of all kernels before it too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton reads a global in a kernel only if it is a constexpr.
E4M3_MAX = tl.constexpr(448.0)
MIN_TOKEN_SCALE = tl.constexpr(2.0**-14)
INT8_MAX = tl.constexpr(127.0)
MIN_CACHE_SCALE = tl.constexpr(2.0**-64)


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start; it waits for this one's results itself."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernels before this one; call it before reading what they write or writing what they read."""
    if PDL:
        gdc_wait()


@triton.jit
def publish(PDL: tl.constexpr):
    """Show what was stored so far to kernels that don't wait, but start when this one has ended."""
    if PDL:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            "fence.acq_rel.gpu; mov.u32 $0, $1;", "=r,r", [tl.arange(0, 32)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prefetch(pointers):
    """Start copying the lines of 128 bytes at `pointers` to L2; before `wait`, of what no kernel of the step writes.

    For kernels launched with PDL: Triton's interpreter knows no assembly.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def token_scale(amax):
    """The activation scale of a token whose largest magnitude is `amax`."""
    return tl.maximum(amax / E4M3_MAX, MIN_TOKEN_SCALE)


@triton.jit
def to_codes(value, scale):
    """E4M3 codes of value / scale, clamped to ±448, which rounding alone exceeds."""
    divided = value * (1.0 / scale)
    return tl.minimum(tl.maximum(divided, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def cache_row(table, slot, head, position, is_there, extent, KV_HEADS: tl.constexpr, PAGE: tl.constexpr):
    """Where a key head's `position` is in a cache, counted in rows of D elements; the next positions follow.

    PAGE: positions of a block, behind which the next ones are elsewhere; 0: slots of `extent` positions. table: each
    slot's `extent` blocks. Where `is_there` is false, the row is one that exists.
    """
    if PAGE:
        block = tl.load(table + slot * extent + position // PAGE, mask=is_there, other=0).to(tl.int64)
        row = (block * KV_HEADS + head) * PAGE + position % PAGE
    else:
        row = (slot * KV_HEADS + head) * extent + position
    return row


@triton.jit
def cache_scale(amax):
    """The scale of a cached head whose largest magnitude is `amax`: the least of bfloat16 that gives codes <= 127."""
    bits = tl.maximum(amax / INT8_MAX, MIN_CACHE_SCALE).to(tl.int32, bitcast=True)
    return (((bits + 0xFFFF) >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def cache_codes(value, scale):
    """The integer nearest to value / scale, of halves the upper."""
    return tl.floor(value / scale + 0.5)


@triton.jit
def sum_of_parts(parts, offsets, mask, stride, NUM_PARTS: tl.constexpr):
    """Σ parts[s, offsets] in float32, in order of s: the result of a split-K matrix product."""
    total = tl.load(parts + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(parts + part * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def running_softmax(score, best, total, scale):
    """Take one block of scores [M, N] into a running softmax, whose largest score and sum are best and total [M].

    Scores are unscaled, so that scaling and subtracting the largest are one instruction. scale: positive, times
    log2(e). Returns the block's shares [M, N], not yet divided by the sum; best and total; and what earlier shares
    shrink by [M].
    """
    new_best = tl.maximum(best, tl.max(score, axis=1))
    shrink = tl.exp2((best - new_best) * scale)
    p = tl.exp2(score * scale - (new_best * scale)[:, None])
    return p, new_best, total * shrink + tl.sum(p, axis=1), shrink
