"""The dimensions and choices that only some architectures have, as a checkpoint's configuration gives them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deepseek_triton.ensemble.decoder.errors import SpecError

Choice = Literal["greedy", "group_maximum", "group_top2"]


@dataclass(frozen=True)
class IndexerOptions:
    """The indexer of DeepSeek's sparse attention: by its scores a token attends to `topk` tokens at most.

    num_heads, head_dim: of its queries; it has one key a token, of head_dim elements.
    """

    num_heads: int
    head_dim: int
    topk: int


@dataclass(frozen=True)
class LatentOptions:
    """Multi-head latent attention. Dimensions in elements.

    q_lora_rank: None: the query has one matrix, not two. has_bias: on the matrices that read or write hidden states,
    but for a query's only one. is_interleaved: the checkpoint's rotary channels are pairs of neighbours, not halves.
    softmax_factor: multiplies the softmax scale, (qk_nope_head_dim + qk_rope_head_dim) ** -0.5. indexer: None: every
    earlier token is attended to.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    has_bias: bool = False
    is_interleaved: bool = True
    softmax_factor: float = 1.0
    indexer: IndexerOptions | None = None

    def __post_init__(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise SpecError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, must be even for rotary embedding")
        if not 0 < self.softmax_factor < math.inf:
            raise SpecError(f"the softmax factor is {self.softmax_factor}, must be a number above 0")
        if self.indexer is None:
            return
        if self.q_lora_rank is None:
            raise SpecError("an indexer needs q_lora_rank: it reads what the query's first matrix gives")
        if self.indexer.head_dim < self.qk_rope_head_dim:
            raise SpecError(
                f"index_head_dim is {self.indexer.head_dim}, must hold the {self.qk_rope_head_dim} rotary channels"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head of the query and of the key: the part without rotary embedding, then the part with it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class ExpertShare:
    """What a rank of a split model has of a layer's experts. Dimensions in elements.

    first, num_experts: its routed experts. intermediate_size: its part of each; shared_size: of the shared ones.
    """

    first: int
    num_experts: int
    intermediate_size: int
    shared_size: int


@dataclass(frozen=True)
class ExpertOptions:
    """A mixture of experts. Dimensions in elements.

    first_dense_layers: layers before the first that has experts. scores: what makes the router's logits scores.
    choice: "greedy", the highest scores; "group_maximum", those of the topk_group groups whose best expert is best;
    "group_top2", the same by the sum of a group's two best, and every score has a bias added for the choice alone.
    is_normalised: the chosen scores are divided by their sum before `scale` multiplies them.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    num_shared_experts: int
    first_dense_layers: int
    scores: Literal["softmax", "sigmoid"]
    choice: Choice
    num_groups: int = 1
    topk_group: int = 1
    is_normalised: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_experts % self.num_groups:
            raise SpecError(f"n_routed_experts is {self.num_experts}, must be a multiple of n_group {self.num_groups}")
        if self.topk_group > self.num_groups:
            raise SpecError(f"topk_group is {self.topk_group}, must be at most n_group {self.num_groups}")
        group_size = self.num_experts // self.num_groups
        if self.choice == "group_top2" and group_size < 2:
            raise SpecError(f"each of the {self.num_groups} groups has one expert, must have two or more")
        chosen_from = self.num_experts if self.choice == "greedy" else self.topk_group * group_size
        if self.num_experts_per_tok > chosen_from:
            raise SpecError(f"num_experts_per_tok is {self.num_experts_per_tok}, must be at most {chosen_from}")
        if not 0 < self.scale < math.inf:
            raise SpecError(f"routed_scaling_factor is {self.scale}, must be a number above 0")
