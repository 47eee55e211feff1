"""ModelSpec + weights → one ONNX graph with an in-place KV cache.

The graph serves prefill and decode alike: row b of `input_ids` continues sequence b at position `start[b]`, its
first `num_tokens[b]` ids are real, and the logits are those of its last real token. Keys and values are scattered into
the cache the caller gives; bind each `present_*` output to the buffer of its `past_*` input and nothing is copied.
Attention sees the whole cache under a boolean mask: the one form that ONNX Runtime and TensorRT both compute right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deepseek_triton.builders.checkpoint.spec import ModelSpec
from deepseek_triton.builders.graph.builder import GraphBuilder, Progress
from deepseek_triton.builders.graph.float8 import Float8Linear, Float8Nodes
from deepseek_triton.builders.graph.rope import rope_tables

PRODUCER = "deepseek-triton"
DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
Read = Callable[[str], NDArray[Any]]
Quantized = Callable[[str], "Float8Linear | None"]
Logits = Literal["last", "all"]

DOC = """Decoder with an in-place KV cache.
Inputs: input_ids [batch, seq_len] token ids; start [batch] position of each row's first token; num_tokens [batch] how
many of a row's ids are real; past_key_i, past_value_i [batch, kv_heads, max_seq_len, head_dim] the cache of layer i.
Outputs: logits {logits}; present_key_i, present_value_i the cache, to be bound to the buffers of past_key_i and
past_value_i. start + seq_len must not exceed max_seq_len."""


def build_graph(
    spec: ModelSpec,
    read: Read,
    directory: Path,
    *,
    max_seq_len: int,
    precision: str = "fp32",
    quantized: Quantized | None = None,
    opset: int = 24,
    logits: Logits = "last",
    version: str = "",
    progress: Progress | None = None,
) -> Path:
    """Write `model.onnx` and `model.onnx.data` into `directory`.

    Args:
        spec: the decoder's dimensions.
        read: gives a weight by its Hugging Face name; called once for each.
        max_seq_len: positions in the cache of each sequence, in tokens.
        precision: "fp32" or "fp16", for weights, cache and arithmetic alike; logits leave as float32.
        quantized: gives a linear layer by its module's name in FP8, or None: that layer has `precision`, and so has
            everything else. Called once for each, before its weight would be read.
        opset: 24, or 23 for ONNX Runtime before 1.24 (ScatterND instead of TensorScatter).
        logits: "last" [batch, vocab_size], or "all" [batch, seq_len, vocab_size].
        progress: called with the number of bytes of weights just written.

    Returns:
        The path of `model.onnx`.
    """
    with GraphBuilder(directory, "model", opset=opset, progress=progress) as graph:
        decoder = _Decoder(graph, spec, read, max_seq_len, DTYPES[precision], quantized)
        decoder.build(logits)
        shape = (
            "[batch, vocab_size] of each row's last real token" if logits == "last" else "[batch, seq_len, vocab_size]"
        )
        return graph.finish(producer=PRODUCER, version=version, doc=DOC.format(logits=shape))


def build_layer(
    spec: ModelSpec,
    layer: int,
    read: Read,
    directory: Path,
    *,
    max_seq_len: int,
    opset: int,
    quantized: Quantized | None = None,
    outputs: Sequence[str] = (),
) -> Path:
    """Write decoder layer `layer` alone, in float32, as `layer.onnx`: what calibration and evaluation run.

    Input `hidden` [batch, seq_len, hidden], besides `start` and the layer's cache; outputs the layer's own, first, and
    `outputs`: other values by name. FP8 layers are simulated (`Float8Nodes`): the same numbers, much faster on a CPU.
    """
    with GraphBuilder(directory, "layer", opset=opset) as graph:
        decoder = _Decoder(graph, spec, read, max_seq_len, DTYPES["fp32"], quantized, simulate=True)
        decoder.build_layer(layer, outputs)
        return graph.finish(producer=PRODUCER, version="", doc=f"Layer {layer} of a decoder.")


class _Decoder:
    """One build: names of shared values live here, so that the layers can use them."""

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

    def build(self, logits: Logits) -> None:
        g, spec = self.g, self.spec
        g.input("input_ids", TensorProto.INT64, ["batch", "seq_len"], "token ids")
        g.input("start", TensorProto.INT64, ["batch"], "position of each row's first token")
        g.input("num_tokens", TensorProto.INT64, ["batch"], "real tokens in each row")
        self._positions("input_ids")

        embedding = self._weight("model.embed_tokens.weight")
        hidden = g.node("Gather", [embedding, "input_ids"], "embed_tokens", axis=0)  # [batch, seq_len, hidden]
        for layer in range(spec.num_layers):
            hidden = self._layer(layer, hidden)
        if logits == "last":
            last = g.node("Sub", ["num_tokens", self._int(1)], "last_token")
            index = g.node("Unsqueeze", [last, self._int([1])], "last_token_index")  # [batch, 1]
            hidden = g.node("GatherND", [hidden, index], "last_hidden", batch_dims=1)  # [batch, hidden]
        hidden = self._rms_norm(hidden, "model.norm")
        if spec.tie_word_embeddings:
            head = g.node("Transpose", [embedding], "lm_head.weight", perm=[1, 0])
        else:
            head = self._weight("lm_head.weight", transpose=True)
        scores = g.node("MatMul", [hidden, head], "lm_head")
        g.node("Cast", [scores], "logits", to=TensorProto.FLOAT)
        shape: list[int | str] = (
            ["batch", spec.vocab_size] if logits == "last" else ["batch", "seq_len", spec.vocab_size]
        )
        g.output("logits", TensorProto.FLOAT, shape, "scores over the vocabulary")

    def build_layer(self, layer: int, outputs: Sequence[str]) -> None:
        g, hidden_size = self.g, self.spec.hidden_size
        g.input("hidden", self.onnx_dtype, ["batch", "seq_len", hidden_size], "the previous layer's output")
        g.input("start", TensorProto.INT64, ["batch"], "position of each row's first token")
        self._positions("hidden")
        for name in (self._layer(layer, "hidden"), *outputs):
            g.output(name, self.onnx_dtype, ["batch", "seq_len", f"{name}.width"], "a value of the decoder's graph")

    def _positions(self, tokens: str) -> None:
        """`position_ids` [batch, seq_len], and what may be attended: `mask` [batch, 1, seq_len, max_seq_len].

        tokens: a value whose first two dimensions are batch and seq_len.
        """
        g = self.g
        seq_len = g.node("Shape", [tokens], "seq_len_1d", start=1, end=2)
        seq_len = g.node("Squeeze", [seq_len], "seq_len_scalar")
        offsets = g.node("Range", [self._int(0), seq_len, self._int(1)], "offsets")
        start = g.node("Unsqueeze", ["start", self._int([1])], "start_column")
        g.node("Add", [start, offsets], "position_ids")
        queries = g.node("Unsqueeze", ["position_ids", self._int([1, 3])], "query_positions")
        keys = g.constant("key_positions", np.arange(self.max_seq_len, dtype=np.int64))
        g.node("LessOrEqual", [keys, queries], "mask")
        cos, sin = rope_tables(self.spec.rope, self.spec.head_dim, self.max_seq_len)
        g.weight("rope.cos", cos, self.dtype)
        g.weight("rope.sin", sin, self.dtype)
        if g.opset < 24:
            self._scatter_indices()

    def _layer(self, layer: int, hidden: str) -> str:
        g, prefix = self.g, f"model.layers.{layer}"
        normed = self._rms_norm(hidden, f"{prefix}.input_layernorm")
        attended = self._attention(layer, f"{prefix}.self_attn", normed)
        hidden = g.node("Add", [hidden, attended], f"{prefix}.attention_residual")
        normed = self._rms_norm(hidden, f"{prefix}.post_attention_layernorm")
        gate = self._swish(self._linear(normed, f"{prefix}.mlp.gate_proj"), f"{prefix}.mlp.act")
        up = self._linear(normed, f"{prefix}.mlp.up_proj")
        product = g.node("Mul", [gate, up], f"{prefix}.mlp.product")
        return g.node("Add", [hidden, self._linear(product, f"{prefix}.mlp.down_proj")], f"{prefix}.mlp_residual")

    def _attention(self, layer: int, prefix: str, normed: str) -> str:
        g, spec = self.g, self.spec
        q = self._rotate(self._heads(normed, f"{prefix}.q", spec.num_heads, norm=spec.qk_norm), f"{prefix}.q_rotated")
        k = self._rotate(
            self._heads(normed, f"{prefix}.k", spec.num_kv_heads, norm=spec.qk_norm), f"{prefix}.k_rotated"
        )
        v = self._heads(normed, f"{prefix}.v", spec.num_kv_heads, norm=False)
        keys = self._cache(layer, "key", k)
        values = self._cache(layer, "value", v)
        attended = g.node("Attention", [q, keys, values, "mask"], f"{prefix}.attention")  # [batch, heads, seq_len, d]
        attended = g.node("Transpose", [attended], f"{prefix}.attention_rows", perm=[0, 2, 1, 3])
        attended = g.node("Reshape", [attended, self._int([0, 0, -1])], f"{prefix}.attention_flat")
        return self._linear(attended, f"{prefix}.o_proj")

    def _heads(self, normed: str, prefix: str, heads: int, *, norm: bool) -> str:
        """Project and split into heads: [batch, heads, seq_len, head_dim]."""
        g = self.g
        flat = self._linear(normed, f"{prefix}_proj")
        split = g.node("Reshape", [flat, self._int([0, 0, heads, self.spec.head_dim])], f"{prefix}_split")
        if norm:
            split = self._rms_norm(split, f"{prefix}_norm")
        return g.node("Transpose", [split], f"{prefix}_heads", perm=[0, 2, 1, 3])

    def _rotate(self, heads: str, name: str) -> str:
        return self.g.node("RotaryEmbedding", [heads, "rope.cos", "rope.sin", "position_ids"], name)

    def _cache(self, layer: int, kind: str, update: str) -> str:
        """Write `update` [batch, kv_heads, seq_len, head_dim] into the cache at each row's start."""
        g, spec = self.g, self.spec
        shape: list[int | str] = ["batch", spec.num_kv_heads, self.max_seq_len, spec.head_dim]
        past = g.input(f"past_{kind}_{layer}", self.onnx_dtype, shape, f"{kind} cache of layer {layer}")
        present = f"present_{kind}_{layer}"
        if g.opset < 24:
            g.node("ScatterND", [past, "scatter_indices", update], present)
        else:
            g.node("TensorScatter", [past, update, "start"], present, axis=-2)
        g.output(present, self.onnx_dtype, shape, f"{kind} cache of layer {layer}, bound to past_{kind}_{layer}")
        return present

    def _scatter_indices(self) -> None:
        """(row, head, position) of every written vector: [batch, kv_heads, seq_len, 3]."""
        g = self.g
        batch = g.node("Squeeze", [g.node("Shape", ["start"], "batch_1d")], "batch_scalar")
        rows = g.node("Range", [self._int(0), batch, self._int(1)], "rows")
        rows = g.node("Unsqueeze", [rows, self._int([1, 2])], "row_index")  # [batch, 1, 1]
        heads = g.constant("head_index", np.arange(self.spec.num_kv_heads, dtype=np.int64)[None, :, None])
        positions = g.node("Unsqueeze", ["position_ids", self._int([1])], "position_index")  # [batch, 1, seq_len]
        zero = g.node("Mul", [g.node("Add", [rows, heads], "row_head"), self._int(0)], "row_head_zero")
        full = g.node("Mul", [g.node("Add", [zero, positions], "broadcast"), self._int(0)], "full_zero")
        parts = [
            g.node("Unsqueeze", [g.node("Add", [part, full], f"{name}_full"), self._int([3])], f"{name}_part")
            for name, part in (("row", rows), ("head", heads), ("position", positions))
        ]
        g.node("Concat", parts, "scatter_indices", axis=3)

    def _rms_norm(self, value: str, module: str) -> str:
        weight = self._weight(f"{module}.weight")
        return self.g.node("RMSNormalization", [value, weight], module, axis=-1, epsilon=self.spec.rms_norm_eps)

    def _swish(self, value: str, name: str) -> str:
        if self.g.opset >= 24:
            return self.g.node("Swish", [value], name)
        return self.g.node("Mul", [value, self.g.node("Sigmoid", [value], f"{name}.sigmoid")], name)

    def _linear(self, value: str, module: str) -> str:
        """value [..., in] times the module's weight, stored [in, out], plus its bias where it has one."""
        g, bias = self.g, f"{module}.bias"
        linear = self.quantized(module)
        if linear is not None:
            if linear.bias is None:
                return self.float8.matmul(value, module, linear, module)
            product = self.float8.matmul(value, module, linear, f"{module}.product")
            return g.node("Add", [product, g.weight(bias, linear.bias, self.dtype)], module)
        weight = self._weight(f"{module}.weight", transpose=True)
        if bias not in self.spec.tensor_shapes():
            return g.node("MatMul", [value, weight], module)
        product = g.node("MatMul", [value, weight], f"{module}.product")
        return g.node("Add", [product, self._weight(bias)], module)

    def _weight(self, name: str, *, transpose: bool = False) -> str:
        return self.g.weight(name, self.read(name), self.dtype, transpose=transpose)

    def _int(self, value: int | list[int]) -> str:
        """A shared INT64 constant."""
        array = np.asarray(value, dtype=np.int64)
        key = (array.ndim, *array.reshape(-1).tolist())
        if key not in self._ints:
            self._ints[key] = self.g.constant("int_" + "_".join(map(str, key)).replace("-", "m"), array)
        return self._ints[key]
