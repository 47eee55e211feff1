"""The table of decoder architectures: what sets one apart from another, and the parts that its layers are made of.

A new dense architecture is one entry here. One with a new kind of part is that part's file, an entry, and a forward
pass each in the graph builder and in the cuda runner (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.errors import SpecError
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.part import Part

if TYPE_CHECKING:
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

PARTS: tuple[type[Part], ...] = (GroupedQueryAttention, DenseMlp, LatentAttention, MixtureOfExperts)
# Patterns of the linear layers of every kind of part: a recipe is told modules' names and no model.
LINEAR_MODULES = tuple(pattern for part in PARTS for pattern in part.LINEARS)


def dense_layer(spec: ModelSpec, layer: int) -> tuple[Part, ...]:
    """Grouped-query attention and a dense MLP, the same in every layer."""
    return (
        GroupedQueryAttention(
            spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim,
            qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, qk_norm=spec.qk_norm,
        ),
        DenseMlp(spec.hidden_size, spec.intermediate_size, spec.mlp_bias),
    )  # fmt: skip


def latent_layer(spec: ModelSpec, layer: int) -> tuple[Part, ...]:
    """Latent attention; a dense MLP in the first layers, then experts."""
    if spec.latent is None:
        raise SpecError(f"architecture {spec.architecture!r} needs the dimensions of latent attention")
    attention = LatentAttention(spec.hidden_size, spec.num_heads, spec.latent)
    if spec.experts is None or layer < spec.experts.first_dense_layers:
        return attention, DenseMlp(spec.hidden_size, spec.intermediate_size, spec.mlp_bias)
    return attention, MixtureOfExperts(spec.hidden_size, spec.experts)


@dataclass(frozen=True)
class Architecture:
    """One decoder architecture.

    qkv_bias: q, k and v always have biases. qk_norm: each head of q and k is normalised. reads_attention_bias:
    config.json's `attention_bias` means biases on q, k, v and o. reads_mlp_bias: its `mlp_bias` means them in the MLP.
    default_head_dim, default_num_kv_heads: what holds where config.json has no such key; None: as many channels as
    share the hidden size evenly, and as many heads as q has. gguf_interleaves_heads: GGUF files hold the rows of q
    and k in llama.cpp's order, in which the two halves of a head alternate. parts: a layer's parts, by its index.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    reads_attention_bias: bool = True
    reads_mlp_bias: bool = False
    default_head_dim: int | None = None
    default_num_kv_heads: int | None = None
    gguf_interleaves_heads: bool = False
    parts: Callable[[ModelSpec, int], tuple[Part, ...]] = dense_layer

    @property
    def is_latent(self) -> bool:
        """Whether its attention is latent attention."""
        return self.parts is latent_layer


# The `model_type` of config.json and the `general.architecture` of GGUF agree for these.
ARCHITECTURES: dict[str, Architecture] = {
    # The defaults are those of transformers' configuration classes.
    "llama": Architecture(reads_mlp_bias=True, gguf_interleaves_heads=True),  # DeepSeek-LLM, -Coder, R1-Distill-Llama
    "qwen2": Architecture(qkv_bias=True, reads_attention_bias=False, default_num_kv_heads=32),  # R1-Distill-Qwen
    "qwen3": Architecture(qk_norm=True, default_head_dim=128, default_num_kv_heads=32),  # R1-0528-Qwen3
    "deepseek_v2": Architecture(parts=latent_layer, gguf_interleaves_heads=True),  # V2, V2-Lite, Coder-V2, V2.5
    "deepseek_v3": Architecture(parts=latent_layer, gguf_interleaves_heads=True),  # V3, R1, V3.1
    "deepseek_v32": Architecture(parts=latent_layer),  # V3.2-Exp, V3.2
}
