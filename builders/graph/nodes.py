"""The nodes that every part of a decoder's graph is made of: norms, linear layers, shared constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.builders.graph.blocks.nodes import BlockNodes
from deepseek_triton.builders.graph.builder import GraphBuilder
from deepseek_triton.builders.graph.float8 import Float8Linear, Float8Nodes
from deepseek_triton.builders.graph.node_list import MICROSOFT
from deepseek_triton.builders.graph.rope import rope_tables
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import ModelSpec

Read = Callable[[str], NDArray[Any]]
Float8Layers = Callable[[str], "Float8Linear | None"]
Quantized = Callable[[str], "Float8Linear | BlockLinear | None"]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class DecoderNodes:
    """One graph that is being built, and the constants that its layers share.

    Args:
        read: gives a weight by its Hugging Face name.
        max_seq_len: positions of a sequence, in tokens.
        dtype: of weights, cache and arithmetic.
        quantized: gives a linear layer in FP8 or in blocks by its module's name, or None: it has `dtype`.
        simulate: see `Float8Nodes`.
        fuses: with operators that ONNX Runtime alone has, as com.microsoft.QuickGelu.
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
        fuses: bool = False,
    ) -> None:
        self.g, self.spec, self.read, self.max_seq_len, self.dtype = graph, spec, read, max_seq_len, dtype
        self.quantized, self.fuses = quantized or (lambda module: None), fuses
        self.float8 = Float8Nodes(graph, dtype, simulate=simulate)
        self.blocks = BlockNodes(graph)
        self.onnx_dtype = helper.np_dtype_to_tensor_dtype(dtype)
        self.int = graph.int

    def rope_tables(self) -> None:
        """`rope.cos` and `rope.sin`, [max_seq_len, rotary_dim / 2]."""
        cos, sin = rope_tables(self.spec.rope, self.spec.rotary_dim, self.max_seq_len)
        self.g.weight("rope.cos", cos, self.dtype)
        self.g.weight("rope.sin", sin, self.dtype)

    def rms_norm(self, value: str, module: str, epsilon: float | None = None) -> str:
        """value [..., size], normalised and multiplied by the module's weight; epsilon: None, the decoder's own."""
        weight, epsilon = self.weight(f"{module}.weight"), self.spec.rms_norm_eps if epsilon is None else epsilon
        return self.g.node("RMSNormalization", [value, weight], module, axis=-1, epsilon=epsilon)

    def swish(self, value: str, name: str) -> str:
        """value * sigmoid(value)."""
        if self.fuses and self.dtype == np.float32:
            return self.g.node("QuickGelu", [value], name, domain=MICROSOFT, alpha=1.0)
        if self.g.opset >= 24:
            return self.g.node("Swish", [value], name)
        return self.g.node("Mul", [value, self.g.node("Sigmoid", [value], f"{name}.sigmoid")], name)

    def linear(self, value: str, prefix: str, linear: Linear) -> str:
        """value [..., in] times the layer's weight, stored [in, out], plus its bias where it has one."""
        module = prefix + linear.module
        return self._product(value, module, self.quantized(module), linear.has_bias)

    def joined(self, value: str, prefix: str, linears: Sequence[Linear], name: str) -> tuple[str, ...]:
        """The outputs of layers that read one value: one value called `name` with all, or one value for each.

        Layers in blocks of one kind are one product, whose outputs lie one behind the other.
        """
        layers = [self.quantized(prefix + linear.module) for linear in linears]
        blocks = [layer for layer in layers if isinstance(layer, BlockLinear)]
        whole = BlockLinear.joined(blocks) if len(blocks) == len(layers) else None
        if whole is not None:
            return (self._product(value, name, whole),)
        return tuple(
            self._product(value, prefix + linear.module, layer, linear.has_bias)
            for linear, layer in zip(linears, layers, strict=True)
        )

    def _product(
        self, value: str, module: str, quantized: Float8Linear | BlockLinear | None, has_bias: bool = False
    ) -> str:
        """has_bias: of a layer that isn't quantised; weight and bias are read in this order."""
        g = self.g
        has_bias = has_bias if quantized is None else quantized.bias is not None
        name = f"{module}.product" if has_bias else module
        if quantized is None:
            g.node("MatMul", [value, self.weight(f"{module}.weight", transpose=True)], name)
        elif isinstance(quantized, BlockLinear):
            self.blocks.matmul(value, module, quantized, name)
        else:
            self.float8.matmul(value, module, quantized, name)
        if not has_bias:
            return name
        bias = self.read(f"{module}.bias") if quantized is None or quantized.bias is None else quantized.bias
        return g.node("Add", [name, g.weight(f"{module}.bias", bias, self.dtype)], module)

    def gated_mlp(self, value: str, prefix: str, name: str, linears: tuple[Linear, Linear, Linear]) -> str:
        """down(silu(gate(value)) * up(value)), value [..., in]; name: begins those of the values `act` and `product`.

        linears: gate, up and down.
        """
        gate, up, down = linears
        g, own = self.g, prefix + name
        outputs = self.joined(value, prefix, (gate, up), f"{own}.gate_up")
        if len(outputs) == 1:
            halves = f"{own}.gate", f"{own}.up"
            g.nodes("Split", outputs, halves, f"{own}.halves", axis=-1, num_outputs=2)
            outputs = halves
        activated = self.swish(outputs[0], f"{own}.act")
        return self.linear(g.node("Mul", [activated, outputs[1]], f"{own}.product"), prefix, down)

    def embedded(self, ids: str, name: str) -> str:
        """ids [batch, seq_len] → their rows of the embedding [batch, seq_len, hidden_size]."""
        blocks = self.quantized(EMBEDDING)
        if isinstance(blocks, BlockLinear):
            return self.blocks.rows(ids, EMBEDDING, blocks, name)
        return self.g.node("Gather", [self.weight(f"{EMBEDDING}.weight"), ids], name, axis=0)

    def head(self, hidden: str, name: str) -> str:
        """hidden [..., hidden_size] → logits [..., vocab_size]; `embedded` has been called before."""
        g, module = self.g, EMBEDDING if self.spec.tie_word_embeddings else HEAD
        blocks = self.quantized(module)
        if isinstance(blocks, BlockLinear):
            return self.blocks.matmul(hidden, module, blocks, name, has_rows=False)
        if self.spec.tie_word_embeddings:
            weight = g.node("Transpose", [f"{EMBEDDING}.weight"], f"{HEAD}.weight", perm=[1, 0])
        else:
            weight = self.weight(f"{HEAD}.weight", transpose=True)
        return g.node("MatMul", [hidden, weight], name)

    def weight(self, name: str, *, transpose: bool = False) -> str:
        """A weight by its Hugging Face name."""
        return self.g.weight(name, self.read(name), self.dtype, transpose=transpose)
