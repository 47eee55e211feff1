"""Float weights → blocks of integers, by the least error that a few scales give.

Eight bits: a block's codes lie symmetrically around zero. Four bits: a scale and a minimum for each block; both are
fitted to the codes by least squares, from several first guesses, as in ggml's `make_qkx2_quants`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.graph.blocks.linear import BlockLinear, Float32

BLOCK_SIZE = 32
LEVELS = 15  # codes of four bits are 0 … 15
GUESSES = np.linspace(0.8, 1.1, 13)  # of the scale, relative to the block's range
ROWS = 2**22  # weights rounded at a time


def rounded(weight: Float32, bits: int) -> BlockLinear:
    """weight: [out, in], `in` a multiple of BLOCK_SIZE; bits: 4 or 8."""
    rows = max(1, ROWS // weight.shape[1])
    pieces = [_rounded(weight[start : start + rows], bits) for start in range(0, len(weight), rows)]
    whole = BlockLinear.joined(pieces)
    assert whole is not None  # all have the same bits
    return whole


def _rounded(weight: Float32, bits: int) -> BlockLinear:
    blocks = weight.reshape(len(weight), -1, BLOCK_SIZE).astype(np.float32)
    if bits == 8:
        scale = np.abs(blocks).max(axis=-1) / np.float32(127)
        return BlockLinear.of_codes(_codes(blocks, scale, 0, 128, 255), 8, scale, 128)
    codes, scale, minimum = _fitted(blocks)
    return BlockLinear.of_codes(codes, 4, scale, minimum)


def _fitted(blocks: Float32) -> tuple[NDArray[np.uint8], Float32, Float32]:
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    best = (np.zeros(blocks.shape, np.uint8), np.zeros_like(low), low)
    least = np.full_like(low, np.inf)
    mean = blocks.mean(axis=-1)
    for guess in GUESSES:
        codes = _codes(blocks, (high - low) / np.float32(LEVELS) * np.float32(guess), low, 0, LEVELS)
        numbers = codes.astype(np.float32)
        centre = numbers.mean(axis=-1)
        spread = ((numbers - centre[..., None]) ** 2).mean(axis=-1)
        shared = ((numbers - centre[..., None]) * (blocks - mean[..., None])).mean(axis=-1)
        scale = np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 0)
        minimum = mean - scale * centre
        error = ((numbers * scale[..., None] + minimum[..., None] - blocks) ** 2).sum(axis=-1)
        is_better = error < least
        least = np.where(is_better, error, least)
        best = (
            np.where(is_better[..., None], codes, best[0]),
            np.where(is_better, scale, best[1]),
            np.where(is_better, minimum, best[2]),
        )
    return best


def _codes(blocks: Float32, scale: Float32, offset: Float32 | int, zero: int, most: int) -> NDArray[np.uint8]:
    """The nearest codes 0 … `most` of (weight - offset) / scale + zero; `zero` where a block's scale is 0."""
    shifted = blocks - (offset if isinstance(offset, int) else offset[..., None])
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes: NDArray[np.uint8] = np.clip(np.rint(shifted * inverse[..., None]) + zero, 0, most).astype(np.uint8)
    return codes
