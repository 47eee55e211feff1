"""The nodes that every part of a decoder's graph is made of: norms, linear layers, shared constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from deepseek_triton.builders.graph.builder import GraphBuilder
from deepseek_triton.builders.graph.float8 import Float8Linear, Float8Nodes
from deepseek_triton.builders.graph.rope import rope_tables
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import ModelSpec

Read = Callable[[str], NDArray[Any]]
Quantized = Callable[[str], "Float8Linear | None"]


class DecoderNodes:
    """One graph that is being built, and the constants that its layers share.

    Args:
        read: gives a weight by its Hugging Face name.
        max_seq_len: positions of a sequence, in tokens.
        dtype: of weights, cache and arithmetic.
        quantized: gives a linear layer in FP8 by its module's name, or None: it has `dtype`.
        simulate: see `Float8Nodes`.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        spec: ModelSpec,
        read: Read,
        max_seq_len: int,
        dtype: np.dtype[Any],
        quantized: Quantized | None = None,
        *,
        simulate: bool = False,
    ) -> None:
        self.g, self.spec, self.read, self.max_seq_len, self.dtype = graph, spec, read, max_seq_len, dtype
        self.quantized = quantized or (lambda module: None)
        self.float8 = Float8Nodes(graph, dtype, simulate=simulate)
        self.onnx_dtype = helper.np_dtype_to_tensor_dtype(dtype)
        self._ints: dict[tuple[int, ...], str] = {}

    def rope_tables(self) -> None:
        """`rope.cos` and `rope.sin`, [max_seq_len, head_dim / 2]."""
        cos, sin = rope_tables(self.spec.rope, self.spec.head_dim, self.max_seq_len)
        self.g.weight("rope.cos", cos, self.dtype)
        self.g.weight("rope.sin", sin, self.dtype)

    def rms_norm(self, value: str, module: str) -> str:
        """value [..., size], normalised and multiplied by the module's weight."""
        weight = self.weight(f"{module}.weight")
        return self.g.node("RMSNormalization", [value, weight], module, axis=-1, epsilon=self.spec.rms_norm_eps)

    def swish(self, value: str, name: str) -> str:
        """value * sigmoid(value)."""
        if self.g.opset >= 24:
            return self.g.node("Swish", [value], name)
        return self.g.node("Mul", [value, self.g.node("Sigmoid", [value], f"{name}.sigmoid")], name)

    def linear(self, value: str, prefix: str, linear: Linear) -> str:
        """value [..., in] times the layer's weight, stored [in, out], plus its bias where it has one."""
        g, module = self.g, prefix + linear.module
        bias = f"{module}.bias"
        float8 = self.quantized(module)
        if float8 is not None:
            if float8.bias is None:
                return self.float8.matmul(value, module, float8, module)
            product = self.float8.matmul(value, module, float8, f"{module}.product")
            return g.node("Add", [product, g.weight(bias, float8.bias, self.dtype)], module)
        weight = self.weight(f"{module}.weight", transpose=True)
        if not linear.has_bias:
            return g.node("MatMul", [value, weight], module)
        product = g.node("MatMul", [value, weight], f"{module}.product")
        return g.node("Add", [product, self.weight(bias)], module)

    def weight(self, name: str, *, transpose: bool = False) -> str:
        """A weight by its Hugging Face name."""
        return self.g.weight(name, self.read(name), self.dtype, transpose=transpose)

    def int(self, value: int | list[int]) -> str:
        """A shared INT64 constant, a scalar or [n]."""
        array = np.asarray(value, dtype=np.int64)
        key = (array.ndim, *array.reshape(-1).tolist())
        if key not in self._ints:
            self._ints[key] = self.g.constant("int_" + "_".join(map(str, key)).replace("-", "m"), array)
        return self._ints[key]
