"""The nodes of layers in blocks of integers: ONNX Runtime's MatMulNBits, and a product of its own for the minima."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.builders.graph.builder import MICROSOFT, GraphBuilder

ACTIVATIONS = 4  # MatMulNBits' accuracy_level: activations are rounded to eight bits in each block
FLOAT, UINT8, INT64 = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int64)


class BlockNodes:
    """Adds layers in blocks of integers to one float32 graph; layers that share an input share its block sums."""

    def __init__(self, graph: GraphBuilder) -> None:
        self.g = graph
        self._sums: dict[tuple[str, int], str] = {}

    def store(self, module: str, linear: BlockLinear) -> None:
        """Write the layer's codes, scales and minima, unless they are there."""
        if self.g.has(f"{module}.codes"):
            return
        self.g.weight(f"{module}.codes", linear.codes, UINT8)
        self.g.weight(f"{module}.scale", linear.scale, FLOAT)
        if linear.minimum is not None:
            self.g.weight(f"{module}.minimum", linear.minimum, FLOAT, transpose=True)  # [blocks, out]

    def matmul(self, value: str, module: str, linear: BlockLinear, name: str, *, has_rows: bool = True) -> str:
        """value [..., in] times the module's weight → `name` [..., out], without the bias.

        has_rows: value is [batch, seq_len, in], whose blocks need no look at its shape.
        """
        g = self.g
        self.store(module, linear)
        n, k = linear.shape
        product = name if linear.minimum is None else f"{name}.centred"
        g.node(
            "MatMulNBits", [value, f"{module}.codes", f"{module}.scale"], product, domain=MICROSOFT,
            K=k, N=n, bits=linear.bits, block_size=linear.block_size, accuracy_level=ACTIVATIONS,
        )  # fmt: skip
        if linear.minimum is None:
            return name
        minima = g.node("MatMul", [self._block_sums(value, linear, has_rows), f"{module}.minimum"], f"{name}.minima")
        return g.node("Add", [product, minima], name)

    def rows(self, ids: str, module: str, linear: BlockLinear, name: str) -> str:
        """The weight's rows `ids` [...] → `name` [..., in]."""
        g = self.g
        self.store(module, linear)
        codes = g.node("Gather", [f"{module}.codes", ids], f"{name}.codes", axis=0)  # [..., blocks, bytes]
        if linear.bits == 4:
            low = g.node("BitwiseAnd", [codes, self._constant("low_half", 15, UINT8)], f"{name}.low")
            high = g.node("BitShift", [codes, self._constant("half_bits", 4, UINT8)], f"{name}.high", direction="RIGHT")
            last = self._constant("last_axis", [-1], INT64)
            parts = [g.node("Unsqueeze", [part, last], f"{part}_column") for part in (low, high)]
            both = g.node("Concat", parts, f"{name}.pairs", axis=-1)
            shape = self._constant(f"{name}.block", [0, 0, 0, linear.block_size], INT64)
            codes = g.node("Reshape", [both, shape], f"{name}.unpacked")
        values = g.node("Cast", [codes], f"{name}.numbers", to=TensorProto.FLOAT)
        centre = self._constant(f"centre_{linear.bits}", float(1 << (linear.bits - 1)), FLOAT)
        values = g.node("Sub", [values, centre], f"{name}.centred")
        last = self._constant("last_axis", [-1], INT64)
        scale = g.node("Gather", [f"{module}.scale", ids], f"{name}.scale", axis=0)
        values = g.node("Mul", [values, g.node("Unsqueeze", [scale, last], f"{name}.scales")], f"{name}.scaled")
        if linear.minimum is not None:
            minimum = g.node("Gather", [f"{module}.minimum", ids], f"{name}.minimum", axis=1)  # [blocks, ...]
            minimum = g.node("Transpose", [minimum], f"{name}.minima", perm=[1, 2, 0])
            values = g.node("Add", [values, g.node("Unsqueeze", [minimum, last], f"{name}.offsets")], f"{name}.shifted")
        return g.node("Reshape", [values, self._constant("join_blocks", [0, 0, -1], INT64)], name)

    def _block_sums(self, value: str, linear: BlockLinear, has_rows: bool) -> str:
        """value [..., in] → the sum of each block: [..., blocks]."""
        key = (value, linear.block_size)
        if key not in self._sums:
            g, name = self.g, f"{value}.blocks_of_{linear.block_size}"
            if has_rows:
                shape = self._constant(f"rows_of_{linear.block_size}", [0, 0, -1, linear.block_size], INT64)
            else:
                leading = g.node("Shape", [value], f"{name}.leading", start=0, end=-1)
                block = self._constant(f"block_of_{linear.block_size}", [-1, linear.block_size], INT64)
                shape = g.node("Concat", [leading, block], f"{name}.shape", axis=0)
            blocks = g.node("Reshape", [value, shape], name)
            last = self._constant("last_axis", [-1], INT64)
            self._sums[key] = g.node("ReduceSum", [blocks, last], f"{name}.sums", keepdims=0)
        return self._sums[key]

    def _constant(self, name: str, value: Any, dtype: np.dtype[Any]) -> str:
        name = f"blocks.{name}"
        return name if self.g.has(name) else self.g.constant(name, np.asarray(value, dtype))
