"""GGUF's weights in blocks of integers, number for number: nothing is rounded again.

Source: ggml's `ggml-common.h` (the structures) and `ggml-quants.c` (what they stand for).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
ONE, TWO, THREE, HALF, SIX, LOW, SIX_BITS = (np.uint8(number) for number in (1, 2, 3, 4, 6, 15, 63))
Float32 = NDArray[np.float32]
# codes [blocks, sub-blocks × size], scales and offsets [blocks, sub-blocks]; an int offset is taken from each code
Parts = tuple[Bytes, Float32, "Float32 | int"]


@dataclass(frozen=True)
class IntegerBlocks:
    """A weight [out, in] whose rows are blocks of small integers, each with a scale of its own.

    kind: the name of its type in GGUF. code_bits: a code is 0 … 2^code_bits - 1. codes: [out, blocks, block_size], one
    in each byte. scale: float32 [out, blocks]. offset: float32 as scale, a weight is code × scale + offset; or an
    integer, a weight is (code - offset) × scale.
    """

    kind: str
    code_bits: int
    codes: Bytes
    scale: Float32
    offset: Float32 | int

    def rows(self, order: NDArray[Any]) -> IntegerBlocks:
        """The weight whose row i is this one's order[i]."""
        offset = self.offset if isinstance(self.offset, int) else self.offset[order]
        return replace(self, codes=self.codes[order], scale=self.scale[order], offset=offset)


@dataclass(frozen=True)
class StoredBlocks:
    """Modules whose weights are stored in blocks. read: gives one by its module's name, and counts it in the digest."""

    modules: frozenset[str]
    read: Callable[[str], IntegerBlocks]


def _halves(qs: Bytes) -> Bytes:
    """The low halves of the bytes [..., n], then the high ones: [..., 2n]."""
    return np.concatenate([qs & LOW, qs >> HALF], axis=-1)


def _float16(raw: Bytes) -> Float32:
    """Bytes [blocks, 2n] → [blocks, n]."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _fifth_bits(raw: Bytes) -> Bytes:
    """Four bytes of bits → 16 for each code whose bit is set: [blocks, 32]."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << HALF


def _q4_0(raw: Bytes) -> Parts:
    return _halves(raw[:, 2:]), _float16(raw[:, :2]), 8


def _q4_1(raw: Bytes) -> Parts:
    return _halves(raw[:, 4:]), _float16(raw[:, :2]), _float16(raw[:, 2:4])


def _q5_0(raw: Bytes) -> Parts:
    return _halves(raw[:, 6:]) | _fifth_bits(raw[:, 2:6]), _float16(raw[:, :2]), 16


def _q5_1(raw: Bytes) -> Parts:
    return _halves(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]), _float16(raw[:, :2]), _float16(raw[:, 2:4])


def _q8_0(raw: Bytes) -> Parts:
    return raw[:, 2:] ^ np.uint8(128), _float16(raw[:, :2]), 128


def _six_bit_pairs(raw: Bytes) -> tuple[Float32, Float32]:
    """Q4_K's and Q5_K's 12 bytes → 8 scales and 8 minima of six bits each."""
    first, second, rest = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([first & SIX_BITS, (rest & LOW) | (first >> SIX) << HALF], axis=-1)
    minima = np.concatenate([second & SIX_BITS, (rest >> HALF) | (second >> SIX) << HALF], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(raw: Bytes) -> Parts:
    scales, minima = _six_bit_pairs(raw[:, 4:16])
    codes = _halves(raw[:, 16:].reshape(-1, 4, 32)).reshape(len(raw), 256)
    return codes, _float16(raw[:, 0:2]) * scales, -(_float16(raw[:, 2:4]) * minima)


def _q5_k(raw: Bytes) -> Parts:
    scales, minima = _six_bit_pairs(raw[:, 4:16])
    codes = _halves(raw[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & ONE
    codes = (codes | high << HALF).reshape(len(raw), 256)
    return codes, _float16(raw[:, 0:2]) * scales, -(_float16(raw[:, 2:4]) * minima)


def _q6_k(raw: Bytes) -> Parts:
    low = _halves(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & THREE
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return (low | high << HALF).reshape(len(raw), 256), _float16(raw[:, 208:210]) * scales, 32


def _two_bits(raw: Bytes) -> Bytes:
    """64 bytes of two-bit codes → [blocks, 256]: each 32 bytes hold four runs of 32."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    codes: Bytes = raw.reshape(-1, 2, 1, 32) >> shifts & THREE
    return codes


def _q2_k(raw: Bytes) -> Parts:
    scales = (raw[:, :16] & LOW).astype(np.float32)
    minima = (raw[:, :16] >> HALF).astype(np.float32)
    codes = _two_bits(raw[:, 16:80]).reshape(len(raw), 256)
    return codes, _float16(raw[:, 80:82]) * scales, -(_float16(raw[:, 82:84]) * minima)


def _q3_k(raw: Bytes) -> Parts:
    low, high = raw[:, 96:104], raw[:, 104:108]
    bits = np.concatenate([low & LOW, low >> 4], axis=-1)
    upper = (high[:, None, :] >> np.array([0, 2, 4, 6], np.uint8)[None, :, None] & THREE).reshape(len(raw), 16)
    scales = (bits | upper << HALF).astype(np.float32) - 32
    above = raw[:, None, :32] >> np.arange(8, dtype=np.uint8)[None, :, None] & ONE
    codes = _two_bits(raw[:, 32:96]) | above.reshape(-1, 2, 4, 32) << TWO
    return codes.reshape(len(raw), 256), _float16(raw[:, 108:110]) * scales, 4


READERS: dict[str, Callable[[Bytes], Parts]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


def integer_blocks(kind: str, data: NDArray[Any], shape: tuple[int, ...]) -> IntegerBlocks:
    """A tensor as it lies in the file.

    kind: gguf's name of its type, one of READERS. data: uint8 [out, bytes of a row]. shape: [out, in].
    """
    import gguf

    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    codes, scale, offset = READERS[kind](np.asarray(data).reshape(-1, block_bytes))
    scale = scale.reshape(shape[0], -1)
    offset = offset if isinstance(offset, int) else offset.reshape(scale.shape)
    return IntegerBlocks(kind, int(kind[1]), codes.reshape(*scale.shape, -1), scale, offset)
