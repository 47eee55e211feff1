"""Sequences whose cache, rotation and attention are one node: ONNX Runtime's GroupQueryAttention, on a CPU.

It reads the part of a cache that is filled, where the opset's Attention computes over all of it under a mask.
Source: com.microsoft.GroupQueryAttention, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from onnx import TensorProto

from deepseek_triton.builders.graph.forms.cached import CachedSequences
from deepseek_triton.builders.graph.node_list import MICROSOFT
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import Part

INT32 = TensorProto.INT32


def can_fuse(attention: Part) -> bool:
    """Whether GroupQueryAttention computes a layer's attention: its heads are whole multiples of 16 channels."""
    return isinstance(attention, GroupedQueryAttention) and attention.head_dim % 16 == 0


class FusedSequences(CachedSequences):
    """Implements `Sequences`; inputs, outputs and caches are those of CachedSequences."""

    fuses_attention = True

    def positions(self, tokens: str) -> None:
        """`last_positions` [batch] of each row's last token, and `total_len`: the longest row's tokens, cached too."""
        g, ints = self._nodes.g, self._nodes.int
        seq_len = g.node("Squeeze", [g.node("Shape", [tokens], "seq_len_1d", start=1, end=2)], "seq_len_scalar")
        totals = g.node("Add", ["start", seq_len], "totals")
        g.node("Cast", [g.node("Sub", [totals, ints(1)], "last_positions64")], "last_positions", to=INT32)
        longest = g.node("ReduceMax", [totals], "longest", keepdims=0)
        g.node("Cast", [longest], "total_len", to=INT32)
        self._nodes.rope_tables()

    def grouped_query(self, layer: int, part: GroupedQueryAttention, qkv: tuple[str, ...], name: str) -> str:
        g, inputs, outputs = self._nodes.g, [], []
        for tensor in part.cache:
            past, present = self.declare_cache(layer, tensor)
            inputs.append(past)
            outputs.append(present)
        g.nodes(
            "GroupQueryAttention",
            [*qkv, *[""] * (3 - len(qkv)), *inputs, "last_positions", "total_len", "rope.cos", "rope.sin"],
            [name, *outputs], name, domain=MICROSOFT,
            num_heads=part.num_heads, kv_num_heads=part.num_kv_heads, do_rotary=1,
        )  # fmt: skip
        return name
