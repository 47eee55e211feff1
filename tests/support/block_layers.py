"""Layers in blocks of integers with random codes, and what they compute."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.ensemble.engine.runners.onnx import operators

Float32 = NDArray[np.float32]
IN, OUT = 160, 75  # whole blocks of 16 and of 32; whole panels and a part of one
KINDS = [(bits, block, has_minima, halves) for bits in (4, 8) for block in (16, 32) for has_minima in (False, True)
         for halves in (False, True)]  # fmt: skip

needs_kernels = pytest.mark.skipif(operators.library() is None, reason="no C compiler, or no AVX2")


def layer(
    bits: int, block: int, has_minima: bool, halves: bool, shape: tuple[int, int] = (OUT, IN), seed: int = 0
) -> BlockLinear:
    """Random codes, scales and minima; halves: scales are float16's numbers."""
    random = np.random.default_rng([seed, bits, block])
    rows, blocks = shape[0], shape[1] // block
    codes = random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    scale, minimum = random.normal(size=(2, rows, blocks)).astype(np.float32)
    scale = scale.astype(np.float16).astype(np.float32) if halves else scale
    return BlockLinear(bits, codes, scale, minimum if has_minima else None)


def inputs(rows: int, width: int = IN) -> Float32:
    values = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    values[:, :32] *= 40  # blocks differ in size
    values[::3, 32:64] = 0
    return values


def expected(linear: BlockLinear, x: Float32) -> NDArray[np.float64]:
    """The outputs, with x rounded to eight bits in each block; minima take it as it is."""
    blocks = x.reshape(len(x), -1, linear.block_size)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    rounded = np.rint(blocks * inverse).astype(np.float64) * scale
    centred = linear.unpacked().astype(np.float64) - (1 << (linear.bits - 1))
    y: NDArray[np.float64] = rounded.reshape(x.shape) @ (centred * linear.scale[..., None]).reshape(linear.shape).T
    return y if linear.minimum is None else y + blocks.astype(np.float64).sum(-1) @ linear.minimum.T.astype(np.float64)
