"""Sequences with an in-place KV cache: what generation runs, prefill and decode alike.

Row b of `input_ids` continues sequence b at position `start[b]`, its first `num_tokens[b]` ids are real, and the logits
are those of its last real token. Keys and values are scattered into the cache that the caller gives; bind each
`present_*` output to the buffer of its `past_*` input and nothing is copied. Attention sees the whole cache under a
boolean mask: the one form that ONNX Runtime and TensorRT both compute right.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from onnx import TensorProto

from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import CacheTensor

Logits = Literal["last", "all"]

DOC = """Decoder with an in-place KV cache.
Inputs: input_ids [batch, seq_len] token ids; start [batch] position of each row's first token; num_tokens [batch] how
many of a row's ids are real; past_key_i, past_value_i [batch, kv_heads, max_seq_len, head_dim] the cache of layer i.
Outputs: logits {logits}; present_key_i, present_value_i the cache, to be bound to the buffers of past_key_i and
past_value_i. start + seq_len must not exceed max_seq_len."""


class CachedSequences:
    """Implements `Sequences`. logits: of each row's "last" real token, or of "all"."""

    def __init__(self, nodes: DecoderNodes, logits: Logits = "last") -> None:
        self._nodes, self._logits = nodes, logits

    @property
    def doc(self) -> str:
        """The graph's own documentation."""
        last = "[batch, vocab_size] of each row's last real token"
        return DOC.format(logits=last if self._logits == "last" else "[batch, seq_len, vocab_size]")

    def begin(self) -> str:
        g = self._nodes.g
        g.input("input_ids", TensorProto.INT64, ["batch", "seq_len"], "token ids")
        g.input("start", TensorProto.INT64, ["batch"], "position of each row's first token")
        g.input("num_tokens", TensorProto.INT64, ["batch"], "real tokens in each row")
        self.positions("input_ids")
        return "input_ids"

    def positions(self, tokens: str) -> None:
        """`position_ids` [batch, seq_len], and what may be attended: `mask` [batch, 1, seq_len, max_seq_len].

        tokens: a value whose first two dimensions are batch and seq_len.
        """
        g = self._nodes.g
        seq_len = g.node("Shape", [tokens], "seq_len_1d", start=1, end=2)
        seq_len = g.node("Squeeze", [seq_len], "seq_len_scalar")
        offsets = g.node("Range", [self._nodes.int(0), seq_len, self._nodes.int(1)], "offsets")
        start = g.node("Unsqueeze", ["start", self._nodes.int([1])], "start_column")
        g.node("Add", [start, offsets], "position_ids")
        queries = g.node("Unsqueeze", ["position_ids", self._nodes.int([1, 3])], "query_positions")
        keys = g.constant("key_positions", np.arange(self._nodes.max_seq_len, dtype=np.int64))
        g.node("LessOrEqual", [keys, queries], "mask")
        self._nodes.rope_tables()
        if g.opset < 24:
            self._scatter_indices()

    def rotated(self, heads: str, name: str) -> str:
        return self._nodes.g.node("RotaryEmbedding", [heads, "rope.cos", "rope.sin", "position_ids"], name)

    def attended(self, part: GroupedQueryAttention, layer: int, qkv: tuple[str, str, str], name: str) -> str:
        q, *updates = qkv
        caches = [self._cached(layer, *each) for each in zip(part.cache, updates, strict=True)]
        return self._nodes.g.node("Attention", [q, *caches, "mask"], name)

    def predicting(self, hidden: str) -> str:
        if self._logits == "all":
            return hidden
        g, ints = self._nodes.g, self._nodes.int
        last = g.node("Sub", ["num_tokens", ints(1)], "last_token")
        index = g.node("Unsqueeze", [last, ints([1])], "last_token_index")  # [batch, 1]
        return g.node("GatherND", [hidden, index], "last_hidden", batch_dims=1)  # [batch, hidden]

    def finish(self, logits: str) -> None:
        g, vocab_size = self._nodes.g, self._nodes.spec.vocab_size
        g.node("Cast", [logits], "logits", to=TensorProto.FLOAT)
        shape: list[int | str] = ["batch", vocab_size] if self._logits == "last" else ["batch", "seq_len", vocab_size]
        g.output("logits", TensorProto.FLOAT, shape, "scores over the vocabulary")

    def _cached(self, layer: int, tensor: CacheTensor, update: str) -> str:
        """Write `update` [batch, num_heads, seq_len, head_dim] into the cache at each row's start."""
        g, kind = self._nodes.g, tensor.kind
        shape: list[int | str] = ["batch", tensor.num_heads, self._nodes.max_seq_len, tensor.head_dim]
        past = g.input(f"past_{kind}_{layer}", self._nodes.onnx_dtype, shape, f"{kind} cache of layer {layer}")
        present = f"present_{kind}_{layer}"
        if g.opset < 24:
            g.node("ScatterND", [past, "scatter_indices", update], present)
        else:
            g.node("TensorScatter", [past, update, "start"], present, axis=-2)
        g.output(present, self._nodes.onnx_dtype, shape, f"{kind} cache of layer {layer}, bound to past_{kind}_{layer}")
        return present

    def _scatter_indices(self) -> None:
        """(row, head, position) of every written vector: [batch, kv_heads, seq_len, 3]."""
        g = self._nodes.g
        batch = g.node("Squeeze", [g.node("Shape", ["start"], "batch_1d")], "batch_scalar")
        rows = g.node("Range", [self._nodes.int(0), batch, self._nodes.int(1)], "rows")
        rows = g.node("Unsqueeze", [rows, self._nodes.int([1, 2])], "row_index")  # [batch, 1, 1]
        heads = g.constant("head_index", np.arange(self._nodes.spec.num_kv_heads, dtype=np.int64)[None, :, None])
        positions = g.node("Unsqueeze", ["position_ids", self._nodes.int([1])], "position_index")  # [batch, 1, seq_len]
        zero = g.node("Mul", [g.node("Add", [rows, heads], "row_head"), self._nodes.int(0)], "row_head_zero")
        full = g.node("Mul", [g.node("Add", [zero, positions], "broadcast"), self._nodes.int(0)], "full_zero")
        parts = [
            g.node("Unsqueeze", [g.node("Add", [part, full], f"{name}_full"), self._nodes.int([3])], f"{name}_part")
            for name, part in (("row", rows), ("head", heads), ("position", positions))
        ]
        g.node("Concat", parts, "scatter_indices", axis=3)
