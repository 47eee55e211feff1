"""The graph of each kind of part: hidden states in, hidden states with the part's output added out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepseek_triton.builders.graph.nodes import DecoderNodes
from deepseek_triton.builders.graph.parts.dense_mlp import add_dense_mlp
from deepseek_triton.builders.graph.parts.gqa import add_attention
from deepseek_triton.builders.graph.parts.mla import add_latent_attention
from deepseek_triton.builders.graph.parts.moe import add_experts
from deepseek_triton.builders.graph.sequences import Sequences
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.part import Part

# (nodes, sequences, part, layer, hidden [batch, seq_len, hidden_size]) → hidden
PARTS: dict[type[Part], Callable[[DecoderNodes, Sequences, Any, int, str], str]] = {
    GroupedQueryAttention: add_attention,
    DenseMlp: add_dense_mlp,
    LatentAttention: add_latent_attention,
    MixtureOfExperts: add_experts,
}
