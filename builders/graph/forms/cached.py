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

from deepseek_triton.builders.graph.forms.chosen import chosen_mask
from deepseek_triton.builders.graph.node_list import Body
from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Heads
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import CacheTensor

Logits = Literal["last", "all"]

DOC = """Decoder with an in-place KV cache.
Inputs: input_ids [batch, seq_len] token ids; start [batch] position of each row's first token; num_tokens [batch] how
many of a row's ids are real; past_KIND_i [batch, num_heads, max_seq_len, head_dim] the caches of layer i.
Outputs: logits {logits}; present_KIND_i the caches, to be bound to the buffers of past_KIND_i.
start + seq_len must not exceed max_seq_len."""


class CachedSequences:
    """Implements `Sequences`. logits: of each row's "last" real token, or of "all"."""

    fuses_attention = False

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
        """`position_ids` [batch, seq_len], and what may be attended: `mask` [batch, 1, seq_len, kv_len].

        tokens: a value whose first two dimensions are batch and seq_len.
        """
        g = self._nodes.g
        seq_len = g.node("Shape", [tokens], "seq_len_1d", start=1, end=2)
        seq_len = g.node("Squeeze", [seq_len], "seq_len_scalar")
        offsets = g.node("Range", [self._nodes.int(0), seq_len, self._nodes.int(1)], "offsets")
        start = g.node("Unsqueeze", ["start", self._nodes.int([1])], "start_column")
        g.node("Add", [start, offsets], "position_ids")
        queries = g.node("Unsqueeze", ["position_ids", self._nodes.int([1, 3])], "query_positions")
        g.node("LessOrEqual", [self.key_positions(), queries], "mask")
        self._nodes.rope_tables()
        if g.opset < 24:
            self._scatter_indices()

    def key_positions(self) -> str:
        """The positions of the cache that attention sees: [max_seq_len]."""
        return self._nodes.g.constant("key_positions", np.arange(self._nodes.max_seq_len, dtype=np.int64))

    def rows(self, heads: str) -> str:
        return heads

    def rotated(self, heads: str, name: str) -> str:
        return self._nodes.g.node("RotaryEmbedding", [heads, "rope.cos", "rope.sin", "position_ids"], name)

    def attention(
        self, heads: Heads, qkv: tuple[str, str, str], name: str, scale: float | None = None, mask: str | None = None
    ) -> str:
        attributes = {} if scale is None else {"scale": scale}
        return self._nodes.g.node("Attention", [*qkv, mask or "mask"], name, **attributes)

    def chosen(self, scores: Body, topk: int, name: str) -> str:
        return chosen_mask(self._nodes, scores, topk, name)

    def grouped_query(self, layer: int, part: GroupedQueryAttention, qkv: tuple[str, ...], name: str) -> str:
        raise NotImplementedError("attention has nodes of its own here")

    def by_length(self, most: int, few: Body, many: Body, name: str) -> str:
        g = self._nodes.g
        is_few = g.node("LessOrEqual", ["seq_len_scalar", self._nodes.int(most)], f"{name}.is_few")
        return g.branch(is_few, few, many, name)

    def needed(self, layer: int, value: str) -> str:
        return value

    def predicting(self, hidden: str) -> str:
        if self._logits == "all":
            return hidden
        g, ints = self._nodes.g, self._nodes.int
        last = g.node("Sub", ["num_tokens", ints(1)], "last_token")
        index = g.node("Unsqueeze", [last, ints([1])], "last_token_index")  # [batch, 1]
        return g.node("GatherND", [hidden, index], "last_hidden", batch_dims=1)  # [batch, hidden]

    def with_logits(self, hidden: str) -> str:
        return hidden

    def finish(self, logits: str) -> None:
        g, vocab_size = self._nodes.g, self._nodes.spec.vocab_size
        g.node("Cast", [logits], "logits", to=TensorProto.FLOAT)
        shape: list[int | str] = ["batch", vocab_size] if self._logits == "last" else ["batch", "seq_len", vocab_size]
        g.output("logits", TensorProto.FLOAT, shape, "scores over the vocabulary")

    def remembered(self, layer: int, tensor: CacheTensor, rows: str) -> str:
        """Write `rows` into the cache at each row's start."""
        g = self._nodes.g
        past, present = self.declare_cache(layer, tensor)
        if g.opset < 24:
            return g.node("ScatterND", [past, "scatter_indices", rows], present)
        return g.node("TensorScatter", [past, rows, "start"], present, axis=-2)

    def declare_cache(self, layer: int, tensor: CacheTensor) -> tuple[str, str]:
        """The names of the cache's input and of its output, which some node must give."""
        g, kind = self._nodes.g, tensor.kind
        shape: list[int | str] = ["batch", tensor.num_heads, self._nodes.max_seq_len, tensor.head_dim]
        past = g.input(f"past_{kind}_{layer}", self._nodes.onnx_dtype, shape, f"{kind} cache of layer {layer}")
        present = f"present_{kind}_{layer}"
        g.output(present, self._nodes.onnx_dtype, shape, f"{kind} cache of layer {layer}, bound to {past}")
        return past, present

    def _scatter_indices(self) -> None:
        """(row, head, position) of every written vector: [batch, kv_heads, seq_len, 3]."""
        g = self._nodes.g
        batch = g.node("Squeeze", [g.node("Shape", ["start"], "batch_1d")], "batch_scalar")
        rows = g.node("Range", [self._nodes.int(0), batch, self._nodes.int(1)], "rows")
        rows = g.node("Unsqueeze", [rows, self._nodes.int([1, 2])], "row_index")  # [batch, 1, 1]
        heads = g.constant(
            "head_index", np.arange(self._nodes.spec.parts(0)[0].cache[0].num_heads, dtype=np.int64)[None, :, None]
        )
        positions = g.node("Unsqueeze", ["position_ids", self._nodes.int([1])], "position_index")  # [batch, 1, seq_len]
        zero = g.node("Mul", [g.node("Add", [rows, heads], "row_head"), self._nodes.int(0)], "row_head_zero")
        full = g.node("Mul", [g.node("Add", [zero, positions], "broadcast"), self._nodes.int(0)], "full_zero")
        parts = [
            g.node("Unsqueeze", [g.node("Add", [part, full], f"{name}_full"), self._nodes.int([3])], f"{name}_part")
            for name, part in (("row", rows), ("head", heads), ("position", positions))
        ]
        g.node("Concat", parts, "scatter_indices", axis=3)
