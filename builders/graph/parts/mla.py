"""Multi-head latent attention's graph, in two forms that give the same numbers.

A few positions (decoding) multiply the query with the half of kv_b that makes keys and read the latents themselves, as
one key head that all query heads share. Many positions (a prompt) make each head's keys and values from the latents.
Source: DeepSeek-V2, arXiv 2405.04434, appendix C.
"""

from __future__ import annotations

from deepseek_triton.builders.graph.indexer import add_indexer
from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Heads, Sequences
from deepseek_triton.ensemble.decoder.mla import (
    ATTENDED,
    INNER_NORM_EPS,
    KV_A,
    KV_B,
    KV_NORM,
    NORM,
    OUT,
    Q_A,
    Q_NORM,
    LatentAttention,
)
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix


def add_latent_attention(
    nodes: DecoderNodes, sequences: Sequences, part: LatentAttention, layer: int, hidden: str
) -> str:
    """hidden [batch, seq_len, hidden_size] plus attention's output, where it is needed."""
    g, ints, prefix = nodes.g, nodes.int, layer_prefix(layer)
    own = f"{prefix}self_attn"
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    sizes = part.options
    normed = nodes.rms_norm(hidden, prefix + NORM)

    query_input = normed
    if sizes.q_lora_rank is not None:
        query_input = nodes.rms_norm(nodes.linear(normed, prefix, linears[Q_A]), prefix + Q_NORM, INNER_NORM_EPS)
    query = nodes.linear(query_input, prefix, part.query)
    query = g.node("Reshape", [query, ints([0, 0, part.num_heads, part.qk_head_dim])], f"{own}.q_split")
    query = g.node("Transpose", [query], f"{own}.q_heads", perm=[0, 2, 1, 3])
    q_plain, q_rotary = f"{own}.q_plain", f"{own}.q_rotary"
    split = ints([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim])
    g.nodes("Split", [query, split], [q_plain, q_rotary], f"{own}.q_parts", axis=-1)
    q_plain, q_rotary = sequences.rows(q_plain), sequences.rotated(q_rotary, f"{own}.q_rotated")

    latent, k_rotary = f"{own}.latent", f"{own}.k_rotary"
    split = ints([sizes.kv_lora_rank, sizes.qk_rope_head_dim])
    compressed = nodes.linear(normed, prefix, linears[KV_A])
    g.nodes("Split", [compressed, split], [latent, k_rotary], f"{own}.kv_parts", axis=-1)
    latent = nodes.rms_norm(latent, prefix + KV_NORM, INNER_NORM_EPS)
    one_head = ints([1])
    latent = sequences.rows(g.node("Unsqueeze", [latent, one_head], f"{own}.latent_head"))
    k_rotary = sequences.rotated(g.node("Unsqueeze", [k_rotary, one_head], f"{own}.k_head"), f"{own}.k_rotated")
    entry = g.node("Concat", [latent, k_rotary], f"{own}.entry", axis=-1)
    entries = sequences.remembered(layer, part.cache[0], entry)  # [batch, 1, kv_len, entry_size]

    weight = nodes.read(f"{prefix}{KV_B}.weight")  # [heads x (keys, then values), kv_lora_rank]
    by_head = weight.reshape(part.num_heads, -1, sizes.kv_lora_rank)
    to_keys = g.weight(f"{prefix}{KV_B}.keys", by_head[:, : sizes.qk_nope_head_dim], nodes.dtype)  # [heads, nope, rank]
    values = by_head[:, sizes.qk_nope_head_dim :].transpose(0, 2, 1)
    to_values = g.weight(f"{prefix}{KV_B}.values", values, nodes.dtype)  # [heads, rank, v_head_dim]
    scale = part.softmax_scale
    mask = add_indexer(nodes, sequences, part, layer, prefix, (normed, query_input))

    def absorbed() -> str:
        name = f"{own}.absorbed"
        keys = g.node("MatMul", [q_plain, to_keys], f"{name}.q_latent")
        keys = g.node("Concat", [keys, q_rotary], f"{name}.query", axis=-1)
        # The entries are the values too: the columns behind the latent are cut off afterwards, without a copy of them.
        shape = Heads(part.num_heads, part.entry_size)
        attended = sequences.attention(shape, (keys, entries, entries), f"{name}.attention", scale, mask)
        ends = [ints([0]), ints([sizes.kv_lora_rank]), ints([-1])]
        attended = g.node("Slice", [attended, *ends], f"{name}.latents")
        return g.node("MatMul", [attended, to_values], f"{name}.values")

    def decompressed() -> str:
        name = f"{own}.decompressed"
        split = ints([sizes.kv_lora_rank, sizes.qk_rope_head_dim])
        g.nodes("Split", [entries, split], [f"{name}.latents", f"{name}.rotary"], f"{name}.entries", axis=-1)
        keys = g.node("Transpose", [to_keys], f"{name}.to_keys", perm=[0, 2, 1])
        keys = g.node("MatMul", [f"{name}.latents", keys], f"{name}.plain_keys")
        rotary = g.node("Expand", [f"{name}.rotary", ints([1, part.num_heads, 1, 1])], f"{name}.rotary_keys")
        keys = g.node("Concat", [keys, rotary], f"{name}.keys", axis=-1)
        made = g.node("MatMul", [f"{name}.latents", to_values], f"{name}.values")
        query = g.node("Concat", [q_plain, q_rotary], f"{name}.query", axis=-1)
        shape = Heads(part.num_heads, sizes.v_head_dim)
        return sequences.attention(shape, (query, keys, made), f"{name}.attention", scale, mask)

    attended = sequences.by_length(break_even(part), absorbed, decompressed, f"{own}.attention")
    attended = g.node("Transpose", [attended], f"{own}.attention_rows", perm=[0, 2, 1, 3])
    attended = g.node("Reshape", [attended, ints([0, 0, -1])], prefix + ATTENDED)
    attended, hidden = sequences.needed(layer, attended), sequences.needed(layer, hidden)
    output = nodes.linear(attended, prefix, linears[OUT])
    return g.node("Add", [hidden, output], f"{prefix}attention_residual")


def break_even(part: LatentAttention) -> int:
    """The largest number of positions for which reading the latents costs no more than making keys and values.

    Multiplications for each head and cached token: absorbed 2 x entry_size a position; decompressed
    qk_head_dim + v_head_dim a position, and once kv_lora_rank x (qk_nope_head_dim + v_head_dim).
    """
    sizes = part.options
    once = sizes.kv_lora_rank * (sizes.qk_nope_head_dim + sizes.v_head_dim)
    saved = 2 * part.entry_size - part.qk_head_dim - sizes.v_head_dim
    return once // saved if saved > 0 else 2**31 - 1
