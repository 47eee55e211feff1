"""The indexer's graph: which earlier tokens latent attention looks at, by scores of small heads of its own.

Source: DeepSeek-V3.2, arXiv 2512.02556, section 2; transformers' `DeepseekV32Indexer`, which leaves out the Hadamard
transform and the rounding to FP8 of DeepSeek's own kernels, as this does.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Sequences
from deepseek_triton.ensemble.decoder.mla import (
    INDEX_BIAS,
    INDEX_K,
    INDEX_NORM,
    INDEX_NORM_EPS,
    INDEX_Q,
    INDEX_WEIGHTS,
    LatentAttention,
)
from deepseek_triton.ensemble.decoder.options import IndexerOptions


def add_indexer(
    nodes: DecoderNodes, sequences: Sequences, part: LatentAttention, layer: int, prefix: str, values: tuple[str, str]
) -> str | None:
    """The mask of the positions that attention sees, BOOL [batch, 1, seq_len, kv_len]; None: there is no indexer.

    values: the normalised hidden states [batch, seq_len, hidden_size], and what the query's last matrix reads
    [batch, seq_len, q_lora_rank].
    """
    indexer = part.options.indexer
    if indexer is None:
        return None
    g, ints, own = nodes.g, nodes.int, f"{prefix}self_attn.indexer"
    hidden, query_input = values
    query = g.node("MatMul", [query_input, nodes.weight(prefix + INDEX_Q, transpose=True)], f"{own}.q")
    query = g.node("Reshape", [query, ints([0, 0, indexer.num_heads, indexer.head_dim])], f"{own}.q_split")
    query = g.node("Transpose", [query], f"{own}.q_heads", perm=[0, 2, 1, 3])
    query = _rotated(nodes, sequences, indexer, query, f"{own}.rotated_heads")  # [batch, heads, seq_len, head_dim]
    query = g.node("Transpose", [query], f"{own}.query", perm=[0, 2, 1, 3])
    key = g.node("MatMul", [hidden, nodes.weight(prefix + INDEX_K, transpose=True)], f"{own}.k")
    norm = [nodes.weight(prefix + name) for name in (INDEX_NORM, INDEX_BIAS)]
    key = g.node("LayerNormalization", [key, *norm], f"{own}.k_normed", axis=-1, epsilon=INDEX_NORM_EPS)
    key = g.node("Unsqueeze", [key, ints([1])], f"{own}.k_head")
    key = _rotated(nodes, sequences, indexer, key, f"{own}.key")
    keys = sequences.remembered(layer, part.cache[1], key)  # [batch, 1, kv_len, head_dim]
    scaled = nodes.read(prefix + INDEX_WEIGHTS) * np.float32((indexer.num_heads * indexer.head_dim) ** -0.5)
    weight = g.weight(prefix + INDEX_WEIGHTS, scaled, np.dtype(np.float32), transpose=True)
    hidden = _wide(nodes, hidden, f"{own}.hidden")

    def scores() -> str:
        """Each head's product, where it is above 0, times the head's weight for the query, summed over the heads."""
        weights = g.node("MatMul", [hidden, weight], f"{own}.weights")  # [batch, seq_len, heads]
        weights = g.node("Unsqueeze", [weights, ints([2])], f"{own}.weights_row")
        across = g.node("Transpose", [_wide(nodes, keys, f"{own}.keys")], f"{own}.keys_across", perm=[0, 1, 3, 2])
        products = g.node("MatMul", [_wide(nodes, query, f"{own}.query"), across], f"{own}.products")
        above = g.node("Relu", [products], f"{own}.above")  # [batch, seq_len, heads, kv_len]
        total = g.node("MatMul", [weights, above], f"{own}.total")  # [batch, seq_len, 1, kv_len]
        return g.node("Squeeze", [total, ints([2])], f"{own}.scores")

    return sequences.chosen(scores, min(indexer.topk, nodes.max_seq_len), f"{own}.mask")


def _rotated(nodes: DecoderNodes, sequences: Sequences, indexer: IndexerOptions, heads: str, name: str) -> str:
    """heads [batch, heads, seq_len, head_dim] with rotary embedding on the first channels of each."""
    rotary = nodes.spec.rotary_dim
    if indexer.head_dim == rotary:
        return sequences.rotated(heads, name)
    parts = f"{name}_rotary", f"{name}_plain"
    nodes.g.nodes("Split", [heads, nodes.int([rotary, indexer.head_dim - rotary])], parts, f"{name}_parts", axis=-1)
    rotated, plain = sequences.rotated(parts[0], f"{name}_rotated"), sequences.rows(parts[1])
    return nodes.g.node("Concat", [rotated, plain], name, axis=-1)


def _wide(nodes: DecoderNodes, value: str, name: str) -> str:
    """value in float32."""
    if nodes.dtype == np.float32:
        return value
    return nodes.g.node("Cast", [value], f"{name}_wide", to=TensorProto.FLOAT)
