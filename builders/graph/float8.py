"""The nodes of one FP8 linear layer: what a strongly typed compiler turns into an FP8 matrix multiply.

Weights are stored as E4M3 codes, a byte each, and dequantised by their scale; activations pass a
QuantizeLinear / DequantizeLinear pair with a static scale, or with one computed for each token. How scales and codes
were chosen is no business of this file. Operators: https://onnx.ai/onnx/operators/ (QuantizeLinear, DequantizeLinear).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.quantized.scales import spread_scale
from deepseek_triton.builders.graph.builder import GraphBuilder

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
# A token's scale is never smaller: float16 holds nothing below without losing bits.
MIN_TOKEN_SCALE = 2.0**-14


@dataclass(frozen=True)
class Float8Linear:
    """A linear layer in FP8.

    weight: E4M3 codes [out, in]; a weight is code × scale.
    scale: float32, [out] one for each output channel, or [] one for all; a number that the network's dtype holds. Of a
        checkpoint's blocks [out, blocks], for 128 columns each, which no graph has.
    input_scale: of the activations, or None: each token's own, max|x| / 448.
    bias: [out], added to the product; None where the layer has none.
    """

    weight: NDArray[Any]
    scale: NDArray[np.float32]
    input_scale: float | None
    bias: NDArray[np.float32] | None = None

    def dequantized(self) -> NDArray[np.float32]:
        """The weights that the codes stand for: [out, in] float32."""
        values: NDArray[np.float32] = self.weight.astype(np.float32)
        values *= spread_scale(self.scale, values.shape[1])
        return values


class Float8Nodes:
    """Adds FP8 linear layers to one graph; layers that share an input share its quantisation.

    Args:
        dtype: the network's dtype; scales have it too.
        simulate: store each weight as the float that its code stands for, instead of code and DequantizeLinear. The
            numbers are the same and ONNX Runtime's CPU kernels run many times faster.
    """

    def __init__(self, graph: GraphBuilder, dtype: np.dtype[Any], *, simulate: bool = False) -> None:
        self.g, self.dtype, self.simulate = graph, dtype, simulate
        self._inputs: dict[str, tuple[float | None, str, str | None]] = {}

    def matmul(self, value: str, module: str, linear: Float8Linear, name: str) -> str:
        """value [..., in] times the module's FP8 weight → `name` [..., out], without the bias."""
        quantized, token_scale = self._input(value, linear.input_scale)
        weight = self._weight(module, linear)
        if token_scale is None:
            return self.g.node("MatMul", [quantized, weight], name)
        product = self.g.node("MatMul", [quantized, weight], f"{name}.scaled")
        return self.g.node("Mul", [product, token_scale], name)

    def token_scaled(self, value: str) -> tuple[str, str]:
        """[..., in] after a round trip through E4M3, and each token's scale [..., 1], still to be multiplied in."""
        quantized, scale = self._input(value, None)
        assert scale is not None
        return quantized, scale

    def _weight(self, module: str, linear: Float8Linear) -> str:
        g, name = self.g, f"{module}.weight"
        if self.simulate:
            return g.weight(name, linear.dequantized(), self.dtype, transpose=True)
        codes = g.weight(name, linear.weight, E4M3, transpose=True)  # [in, out]
        scale = g.constant(f"{module}.weight_scale", np.asarray(linear.scale, self.dtype))
        axis = {"axis": 1} if linear.scale.ndim else {}
        return g.node("DequantizeLinear", [codes, scale], f"{name}.dequantized", **axis)

    def _input(self, value: str, scale: float | None) -> tuple[str, str | None]:
        """The value after a round trip through E4M3, and the scale of each token still to be multiplied in."""
        if value not in self._inputs:
            divided, token_scale = (value, None) if scale is not None else self._token_scale(value)
            name = self._constant(f"{value}.input_scale", 1.0 if scale is None else scale)
            self._inputs[value] = (scale, self._round_trip(divided, name, value), token_scale)
        known, quantized, token_scale = self._inputs[value]
        if known != scale:
            raise ValueError(f"{value} feeds layers with input scales {known} and {scale}: one value has one scale")
        return quantized, token_scale

    def _token_scale(self, value: str) -> tuple[str, str]:
        g = self.g
        axes = self._once("last_axis", np.array([-1], np.int64))
        largest = g.node("ReduceMax", [g.node("Abs", [value], f"{value}.abs"), axes], f"{value}.amax", keepdims=1)
        inverse = self._once("inverse_e4m3_max", np.asarray(1.0 / E4M3_MAX, self.dtype))
        smallest = self._once("min_token_scale", np.asarray(MIN_TOKEN_SCALE, self.dtype))
        scale = g.node("Mul", [largest, inverse], f"{value}.amax_scaled")
        scale = g.node("Max", [scale, smallest], f"{value}.token_scale")  # [..., 1]
        return g.node("Div", [value, scale], f"{value}.divided"), scale

    def _round_trip(self, value: str, scale: str, name: str) -> str:
        zero = self._once("e4m3_zero", np.zeros((), E4M3))
        codes = self.g.node("QuantizeLinear", [value, scale, zero], f"{name}.quantized")
        return self.g.node("DequantizeLinear", [codes, scale, zero], f"{name}.dequantized")

    def _constant(self, name: str, value: float) -> str:
        return self.g.constant(name, np.asarray(value, self.dtype))

    def _once(self, name: str, value: NDArray[Any]) -> str:
        return name if self.g.has(name) else self.g.constant(name, value)
