"""The gated MLP's graph."""

from __future__ import annotations

from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Sequences
from deepseek_triton.ensemble.decoder.dense_mlp import DOWN, GATE, NORM, PRODUCT, UP, DenseMlp
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix


def add_dense_mlp(nodes: DecoderNodes, sequences: Sequences, part: DenseMlp, layer: int, hidden: str) -> str:
    """hidden [batch, seq_len, hidden_size] plus the MLP's output."""
    g, prefix = nodes.g, layer_prefix(layer)
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    normed = nodes.rms_norm(hidden, prefix + NORM)
    gate = nodes.swish(nodes.linear(normed, prefix, linears[GATE]), f"{prefix}mlp.act")
    up = nodes.linear(normed, prefix, linears[UP])
    product = g.node("Mul", [gate, up], prefix + PRODUCT)
    return g.node("Add", [hidden, nodes.linear(product, prefix, linears[DOWN])], f"{prefix}mlp_residual")
