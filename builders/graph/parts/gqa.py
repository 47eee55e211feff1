"""Grouped-query attention's graph."""

from __future__ import annotations

from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Sequences
from deepseek_triton.ensemble.decoder.gqa import ATTENDED, NORM, OUT, GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix


def add_attention(
    nodes: DecoderNodes, sequences: Sequences, part: GroupedQueryAttention, layer: int, hidden: str
) -> str:
    """hidden [batch, seq_len, hidden_size] plus attention's output."""
    g, prefix = nodes.g, layer_prefix(layer)
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    normed = nodes.rms_norm(hidden, prefix + NORM)

    def heads(name: str, num_heads: int, *, norm: bool = False) -> str:
        """Project and split into heads: [batch, num_heads, seq_len, head_dim]."""
        flat = nodes.linear(normed, prefix, linears[f"self_attn.{name}_proj"])
        name = f"{prefix}self_attn.{name}"
        split = g.node("Reshape", [flat, nodes.int([0, 0, num_heads, part.head_dim])], f"{name}_split")
        if norm:
            split = nodes.rms_norm(split, f"{name}_norm")
        return g.node("Transpose", [split], f"{name}_heads", perm=[0, 2, 1, 3])

    q = sequences.rotated(heads("q", part.num_heads, norm=part.qk_norm), f"{prefix}self_attn.q_rotated")
    k = sequences.rotated(heads("k", part.num_kv_heads, norm=part.qk_norm), f"{prefix}self_attn.k_rotated")
    v = heads("v", part.num_kv_heads)
    attended = sequences.attended(part, layer, (q, k, v), f"{prefix}self_attn.attention")
    attended = g.node("Transpose", [attended], f"{prefix}self_attn.attention_rows", perm=[0, 2, 1, 3])
    attended = g.node("Reshape", [attended, nodes.int([0, 0, -1])], prefix + ATTENDED)
    output = nodes.linear(attended, prefix, linears[OUT])
    return g.node("Add", [hidden, output], f"{prefix}attention_residual")
