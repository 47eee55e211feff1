"""What several kernels share: E4M3 rounding, and programmatic dependent launch.

With PDL a kernel starts while the one before it ends. Each kernel asks for its weights first (they depend on
nothing), lets its successor start (`begin`), and only then waits for its predecessor (`wait`): every kernel waits, so
that waiting for one is waiting for all before it.
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
    """Let the next kernel start; it waits by itself for what it needs."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Nothing that an earlier kernel wrote may be read before, and nothing that one reads be written."""
    if PDL:
        gdc_wait()


@triton.jit
def token_scale(amax):
    """The activation scale of a token whose largest magnitude is `amax`."""
    return tl.maximum(amax / E4M3_MAX, MIN_TOKEN_SCALE)


@triton.jit
def to_codes(value, scale):
    """E4M3 codes of value / scale; a magnitude exceeds 448 by no more than rounding, which is cut off."""
    divided = value * (1.0 / scale)
    return tl.minimum(tl.maximum(divided, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def sum_of_parts(parts, offsets, mask, stride, NUM_PARTS: tl.constexpr):
    """Σ parts[s, offsets] in float32, in order of s: what a matrix product split along its inner dimension gives."""
    total = tl.load(parts + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(parts + part * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    return total
