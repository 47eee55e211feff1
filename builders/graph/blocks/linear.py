"""One linear layer in blocks of integers, as ONNX Runtime's MatMulNBits takes them.

Source: com.microsoft.MatMulNBits, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class BlockLinear:
    """A weight is (code - 2^(bits - 1)) × scale, plus the block's minimum where there is one.

    bits: 4 or 8. codes: uint8 [out, blocks, block_size × bits / 8]; of 4 bits, a byte holds two neighbours, the first
    in its low half. scale: float32 [out, blocks]. minimum: as scale; None: all zero. bias: [out], or None.
    """

    bits: int
    codes: NDArray[np.uint8]
    scale: Float32
    minimum: Float32 | None = None
    bias: Float32 | None = None

    @classmethod
    def of_codes(cls, codes: NDArray[np.uint8], code_bits: int, scale: Float32, offset: Float32 | int) -> BlockLinear:
        """From codes 0 … 2^code_bits - 1, one in each byte.

        codes: [out, blocks, block_size]. offset: [out, blocks], a weight is code × scale + offset; or an integer, a
        weight is (code - offset) × scale.
        """
        bits = 4 if code_bits <= 4 else 8
        # Codes lie around the zero point, so that products with them are small and cancel no minimum.
        middle = offset if isinstance(offset, int) else 1 << (code_bits - 1)
        minimum = None if isinstance(offset, int) else offset + np.float32(middle) * scale
        shifted = codes + np.uint8((1 << (bits - 1)) - middle)
        return cls(bits, packed(shifted, bits), np.ascontiguousarray(scale), minimum)

    @classmethod
    def joined(cls, layers: Sequence[BlockLinear]) -> BlockLinear | None:
        """One layer that gives the outputs of all, one behind the other; None: their blocks differ."""
        if len({(layer.bits, layer.block_size) for layer in layers}) != 1:
            return None

        scales = [layer.scale for layer in layers]
        return cls(
            layers[0].bits,
            np.concatenate([layer.codes for layer in layers]),
            np.concatenate(scales),
            _joined([layer.minimum for layer in layers], scales),
            _joined([layer.bias for layer in layers], [scale[:, 0] for scale in scales]),
        )

    def in_bytes(self, block_size: int) -> BlockLinear:
        """The same weights with codes of eight bits in blocks of `block_size`, of which its own are multiples."""
        codes = self.unpacked() + np.uint8(128 - (1 << (self.bits - 1)))
        pieces = self.block_size // block_size
        scale = np.repeat(self.scale, pieces, axis=1)
        minimum = None if self.minimum is None else np.repeat(self.minimum, pieces, axis=1)
        return BlockLinear(8, codes.reshape(*scale.shape, block_size), scale, minimum, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        rows, blocks, width = self.codes.shape
        return rows, blocks * width * 8 // self.bits

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return self.codes.shape[2] * 8 // self.bits

    def unpacked(self) -> NDArray[np.uint8]:
        """The codes one in each byte: [out, blocks, block_size]."""
        if self.bits == 8:
            return self.codes
        halves = np.stack([self.codes & np.uint8(15), self.codes >> np.uint8(4)], axis=-1)
        codes: NDArray[np.uint8] = halves.reshape(*self.codes.shape[:2], -1)
        return codes

    def dequantized(self) -> Float32:
        """The weights that the codes stand for: [out, in] float32."""
        values = self.unpacked().astype(np.float32) - np.float32(1 << (self.bits - 1))
        values *= self.scale[..., None]
        if self.minimum is not None:
            values += self.minimum[..., None]
        return values.reshape(self.shape)


def _joined(values: Sequence[Float32 | None], like: Sequence[Float32]) -> Float32 | None:
    """One array behind the other, zeros shaped as in `like` for those that are None; None where all are."""
    if all(value is None for value in values):
        return None
    filled = [np.zeros_like(own) if value is None else value for value, own in zip(values, like, strict=True)]
    return np.concatenate(filled)


def packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [..., block_size] → as `BlockLinear.codes` holds them."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    both: NDArray[np.uint8] = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return both
