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
def token_scale(amax):
    """The activation scale of a token whose largest magnitude is `amax`."""
    return tl.maximum(amax / E4M3_MAX, MIN_TOKEN_SCALE)


@triton.jit
def to_codes(value, scale):
    """E4M3 codes of value / scale, clamped to ±448, which rounding alone exceeds."""
    divided = value * (1.0 / scale)
    return tl.minimum(tl.maximum(divided, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def sum_of_parts(parts, offsets, mask, stride, NUM_PARTS: tl.constexpr):
    """Σ parts[s, offsets] in float32, in order of s: the result of a split-K matrix product."""
    total = tl.load(parts + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(parts + part * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    return total
