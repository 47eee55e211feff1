"""Grouped-query attention's graph."""

from __future__ import annotations

from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Heads, Sequences
from deepseek_triton.ensemble.decoder.gqa import ATTENDED, NORM, OUT, GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix


def add_attention(
    nodes: DecoderNodes, sequences: Sequences, part: GroupedQueryAttention, layer: int, hidden: str
) -> str:
    """hidden [batch, seq_len, hidden_size] plus attention's output, where it is needed."""
    g, prefix = nodes.g, layer_prefix(layer)
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    normed = nodes.rms_norm(hidden, prefix + NORM)

    if sequences.fuses_attention:
        attended = sequences.grouped_query(layer, part, _projections(nodes, part, prefix, normed), prefix + ATTENDED)
        return g.node("Add", [hidden, nodes.linear(attended, prefix, linears[OUT])], f"{prefix}attention_residual")

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
    v = sequences.rows(heads("v", part.num_kv_heads))
    keys, values = (sequences.remembered(layer, *each) for each in zip(part.cache, (k, v), strict=True))
    shape = Heads(part.num_heads, part.head_dim)
    attended = sequences.attention(shape, (q, keys, values), f"{prefix}self_attn.attention")
    attended = g.node("Transpose", [attended], f"{prefix}self_attn.attention_rows", perm=[0, 2, 1, 3])
    attended = g.node("Reshape", [attended, nodes.int([0, 0, -1])], prefix + ATTENDED)
    attended, hidden = sequences.needed(layer, attended), sequences.needed(layer, hidden)
    output = nodes.linear(attended, prefix, linears[OUT])
    return g.node("Add", [hidden, output], f"{prefix}attention_residual")


def _projections(nodes: DecoderNodes, part: GroupedQueryAttention, prefix: str, normed: str) -> tuple[str, ...]:
    """Queries, keys and values [batch, seq_len, heads x head_dim] in one value each, or in one for all."""
    g, own = nodes.g, f"{prefix}self_attn"
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    counts = {"q": part.num_heads, "k": part.num_kv_heads, "v": part.num_kv_heads}
    values = nodes.joined(normed, prefix, [linears[f"self_attn.{name}_proj"] for name in counts], f"{own}.qkv")
    if not part.qk_norm:
        return values
    if len(values) == 1:
        sizes = nodes.int([count * part.head_dim for count in counts.values()])
        g.nodes(
            "Split", [*values, sizes], outputs := tuple(f"{own}.{name}" for name in counts), f"{own}.parts", axis=-1
        )
        values = outputs
    normalised = []
    for (name, count), value in zip(list(counts.items())[:2], values, strict=False):
        split = g.node("Reshape", [value, nodes.int([0, 0, count, part.head_dim])], f"{own}.{name}_split")
        split = nodes.rms_norm(split, f"{own}.{name}_norm")
        normalised.append(g.node("Reshape", [split, nodes.int([0, 0, -1])], f"{own}.{name}_flat"))
    return (*normalised, values[2])
