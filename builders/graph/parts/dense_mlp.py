"""The gated MLP's graph."""

from __future__ import annotations

from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.sequences import Sequences
from deepseek_triton.ensemble.decoder.dense_mlp import DOWN, GATE, NORM, UP, DenseMlp
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix


def add_dense_mlp(nodes: DecoderNodes, sequences: Sequences, part: DenseMlp, layer: int, hidden: str) -> str:
    """hidden [batch, seq_len, hidden_size] plus the MLP's output."""
    prefix = layer_prefix(layer)
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    normed = nodes.rms_norm(hidden, prefix + NORM)
    output = nodes.gated_mlp(normed, prefix, "mlp", (linears[GATE], linears[UP], linears[DOWN]))
    return nodes.g.node("Add", [hidden, output], f"{prefix}mlp_residual")
