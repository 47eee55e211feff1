"""The gated MLP in arrays."""

from __future__ import annotations

from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.rounding.arrays import Array
from deepseek_triton.ensemble.decoder.dense_mlp import DOWN, GATE, NORM, PRODUCT, UP, DenseMlp


def run_dense_mlp(values: LayerValues, part: DenseMlp, hidden: Array) -> Array:
    """hidden [seq_len, hidden_size] plus the MLP's output."""
    normed = values.taps[NORM] = values.norm(hidden, NORM)
    product = values.taps[PRODUCT] = gated_product(values, normed, GATE, UP)
    return hidden + values.linear(product, DOWN)


def gated_product(values: LayerValues, value: Array, gate: str, up: str) -> Array:
    """silu(gate(value)) * up(value); gate, up: names of linear layers."""
    gates = values.linear(value, gate)
    swish = gates * (0.5 + 0.5 * values.xp.tanh(0.5 * gates))  # gates * sigmoid(gates), which can't overflow
    return swish * values.linear(value, up)
